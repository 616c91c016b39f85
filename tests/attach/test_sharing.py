"""Memory of a caught program that is a guest's: both see the same bytes, and it stays the program's memory."""

from tests.attach.caught import caught

SEV = """
sev = os.open("/dev/sev", os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_long] * 6
def anonymous(length):
    return libc.mmap(0, length, 3, 0x22, -1, 0)
def peek(addr, length):
    return ctypes.string_at(addr, length)
def poke(addr, data):
    ctypes.memmove(addr, data, len(data))
def op(vm, command, data=b""):
    buffer = ctypes.create_string_buffer(data, max(len(data), 1))
    cmd = bytearray(struct.pack("<IIQII", command, 0, ctypes.addressof(buffer), 0, sev))
    result = ioctl(vm, 0xC008AEBA, cmd)
    return result if result else buffer.raw
INIT2, LAUNCH_START, UPDATE_DATA, DBG_DECRYPT = 22, 2, 3, 17
def sev_vm():
    vm = ioctl(kvm, CREATE_VM, 2)
    op(vm, INIT2, bytes(64))
    print(type(op(vm, LAUNCH_START, bytes(40))).__name__)
    return vm
def decrypted(vm, addr, length):
    out = anonymous(length)
    op(vm, DBG_DECRYPT, struct.pack("<QQI4x", addr, out, length))
    return peek(out, length)
"""


def test_what_is_launched_is_encrypted_where_it_lies() -> None:
    out = caught(
        SEV
        + """
vm = sev_vm()
addr = anonymous(0x4000)
text = bytes(range(256)) * 16
poke(addr, text * 4)
op(vm, UPDATE_DATA, struct.pack("<QI4x", addr + 0x1000, 0x2000))
print(peek(addr, 0x1000) == text, peek(addr + 0x3000, 0x1000) == text)
cipher = peek(addr + 0x1000, 0x1000)
print(cipher != text, cipher != peek(addr + 0x2000, 0x1000))
print(decrypted(vm, addr + 0x1000, 0x1000) == text)
poke(addr + 0x1000, b"changed by the host".ljust(32))
print(decrypted(vm, addr + 0x1010, 0x10) != text[:16], decrypted(vm, addr + 0x1020, 0x10) == text[0x20:0x30])
print(len(os.listdir("/proc/self/fd")))
print(len(os.listdir("/proc/self/fd")))
"""
    )
    *facts, before, after = out.split()
    assert facts == ["bytes", *["True"] * 7]
    assert before == after


def test_memory_that_goes_away_is_the_programs_to_use_again() -> None:
    out = caught(
        SEV
        + """
vm = sev_vm()
def launch(addr):
    poke(addr, b"A" * 0x1000)
    op(vm, UPDATE_DATA, struct.pack("<QI4x", addr, 0x1000))
    return peek(addr, 4) != b"AAAA"
addr = anonymous(0x3000)
print(launch(addr))
libc.madvise(ctypes.c_long(addr), ctypes.c_long(0x3000), 4)
print(peek(addr, 8) == bytes(8))
print(launch(addr))
again = libc.mmap(addr, 0x3000, 3, 0x32, -1, 0)
print(again == addr, peek(addr, 8) == bytes(8), launch(addr))
print(libc.munmap(ctypes.c_long(addr), ctypes.c_long(0x3000)))
other = libc.mmap(addr, 0x3000, 3, 0x32, -1, 0)
print(peek(other, 8) == bytes(8), launch(other))
"""
    )
    assert out.split() == ["bytes", *["True"] * 6, "0", "True", "True"]


def test_other_threads_lose_no_write_while_memory_is_moved() -> None:
    out = caught(
        SEV
        + """
vm = sev_vm()
size = 0x400000
addr = anonymous(size)
counters = (ctypes.c_uint64 * 3).from_address(addr + 0x1000)
stop = []
counts = [0, 0, 0]
def work(i):
    while not stop:
        counters[i] += 1
        counts[i] += 1
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
[t.start() for t in threads]
for at in range(0x10000, size, 0x40000):
    op(vm, UPDATE_DATA, struct.pack("<QI4x", addr + at, 0x1000))
stop.append(1)
[t.join() for t in threads]
print(list(counters) == counts, min(counts) > 0)
"""
    )
    assert out.split() == ["bytes", "True", "True"]


def test_a_signal_in_the_middle_is_not_lost() -> None:
    out = caught(
        SEV
        + """
vm = sev_vm()
seen = []
signal.signal(signal.SIGUSR1, lambda *a: seen.append(1))
def pester():
    for _ in range(50):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.002)
t = threading.Thread(target=pester)
t.start()
done = 0
while t.is_alive():
    addr = anonymous(0x2000)
    poke(addr, b"x" * 0x1000)
    op(vm, UPDATE_DATA, struct.pack("<QI4x", addr, 0x1000))
    done += peek(addr, 4) != b"xxxx"
    libc.munmap(ctypes.c_long(addr), ctypes.c_long(0x2000))
t.join()
print(len(seen) > 20, done > 3)
"""
    )
    assert out.split() == ["bytes", "True", "True"]


def test_memory_that_is_no_memory_cannot_be_pinned() -> None:
    out = caught(
        SEV
        + """
vm = sev_vm()
print(op(vm, UPDATE_DATA, struct.pack("<QI4x", 0x10000, 0x1000)))
readonly = libc.mmap(0, 0x1000, 1, 0x22, -1, 0)
print(op(vm, UPDATE_DATA, struct.pack("<QI4x", readonly, 0x1000)))
"""
    )
    assert out.split() == ["bytes", "ENOMEM", "ENOMEM"]  # sev_pin_memory()
