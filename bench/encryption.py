"""What the host sees of encrypted pages, against the block cipher alone."""

from functools import partial

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from bench.sides import Bench, Side, timed
from softcvm.hw.memenc import Key
from softcvm.hw.profile import PROFILES
from softcvm.hw.soc import Soc

__all__ = ("BENCHES",)

_SIZE = 4 << 20


def _host_view(cpu: str) -> tuple[Side, Side]:
    profile = PROFILES[cpu]
    soc = Soc(profile, _SIZE >> 12)
    data = bytes(range(256)) * (_SIZE >> 8)
    material = bytes(range(profile.xts_key_bytes))
    soc.dram.write(0, data, Key(material))
    key = material[: profile.xts_key_bytes // 2]
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    if soc.host_read(0, _SIZE) == data:
        raise RuntimeError("the host sees plaintext")
    return timed(lambda: soc.host_read(0, _SIZE), repeat=3), timed(
        lambda: ecb.update(data), repeat=3
    )


BENCHES = tuple(
    Bench(
        f"host-view-{cpu}",
        f"the host reads 4 MiB of a guest's pages ({cpu})",
        f"AES-{PROFILES[cpu].xts_key_bytes * 4}-ECB over as much",
        10.0,
        partial(_host_view, cpu),
    )
    for cpu in PROFILES
)
