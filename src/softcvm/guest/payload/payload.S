# SPDX-License-Identifier: GPL-2.0-or-later
#
# The guest in the built-in firmware, in machine code: what firmware and an early kernel of an SNP guest do.
#
# From the reset vector to 64-bit mode with a page table of its own; then by the GHCB specification: version and
# features, a GHCB page, console output through it, acceptance of memory in 2M and 4K pages, a page that is shared with a
# device and taken back, the secrets page, and a request for termination.  A check that fails ends it with its number
# (guest/checks.py).  tools/build_payload.py assembles this file.
#
# Memory: what the image's metadata has validated at launch (guest/firmware.py SECTIONS) is used as it is.
#
# In 64-bit mode R15 is the mask of the C-bit, R14 the GHCB's address.

	.set	pml4, 0x800000
	.set	pdpt, 0x801000
	.set	pd_low, 0x802000
	.set	pd_high, 0x803000
	.set	pt_8m, 0x804000		# 4K pages of the 2M that hold all this
	.set	pd_shared, 0x805000
	.set	ghcb, 0x80a000
	.set	secrets, 0x80d000
	.set	cpuid, 0x80e000
	.set	stack_top, 0x820000
	.set	shared, 0x40000000	# where memory can be reached without the C-bit
	.set	accept_2m, 0x1000000
	.set	accept_4k, 0x100000
	.set	exchange, 0x180000

	.set	check_protocol, 32
	.set	check_psc, 33
	.set	check_pvalidate, 34
	.set	check_contents, 35
	.set	check_device, 36
	.set	check_secrets, 37

	.set	msr_ghcb, 0xc0010130
	.set	msr_efer, 0xc0000080

	.text
	.code16
start:
	cli
	lgdtl	%cs:(gdt_pointer - start)
	mov	%cr0, %eax
	or	$1, %eax
	mov	%eax, %cr0
	ljmpl	$8, $protected

	.code32
protected:				# no paging: every access is private
	mov	$0x10, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$stack_top, %esp
	mov	$cpuid + 16, %esi	# the C-bit: CPUID 8000_001F EBX 5:0, from the page that firmware checked
	mov	cpuid, %ecx
1:	test	%ecx, %ecx
	jz	dead
	cmpl	$0x8000001f, (%esi)
	je	2f
	add	$48, %esi
	dec	%ecx
	jmp	1b
2:	mov	28(%esi), %ecx
	and	$0x3f, %ecx
	mov	%ecx, %edi
	sub	$32, %ecx
	mov	$1, %ebp
	shl	%cl, %ebp		# EBP: bits 63:32 of an entry
	movl	$pdpt + 3, pml4
	mov	%ebp, pml4 + 4
	movl	$pd_low + 3, pdpt
	mov	%ebp, pdpt + 4
	movl	$pd_shared + 3, pdpt + 8
	mov	%ebp, pdpt + 12
	movl	$pd_high + 3, pdpt + 24
	mov	%ebp, pdpt + 28
	movl	$0xffe00083, pd_high + 511 * 8
	mov	%ebp, pd_high + 511 * 8 + 4
	xor	%ecx, %ecx
3:	mov	%ecx, %eax		# the first GiB in 2M pages, private and again shared
	shl	$21, %eax
	or	$0x83, %eax
	mov	%eax, pd_low(, %ecx, 8)
	mov	%ebp, pd_low + 4(, %ecx, 8)
	mov	%eax, pd_shared(, %ecx, 8)
	movl	$0, pd_shared + 4(, %ecx, 8)
	mov	%ecx, %eax
	shl	$12, %eax
	add	$pml4 + 3, %eax
	mov	%eax, pt_8m(, %ecx, 8)
	mov	%ebp, pt_8m + 4(, %ecx, 8)
	inc	%ecx
	cmp	$512, %ecx
	jne	3b
	movl	$0, pt_8m + 4 + (ghcb - pml4) / 512
	movl	$pt_8m + 3, pd_low + 4 * 8
	mov	%cr4, %eax
	or	$0x20, %eax
	mov	%eax, %cr4
	mov	$pml4, %eax
	mov	%eax, %cr3
	mov	$msr_efer, %ecx
	rdmsr
	or	$0x100, %eax
	wrmsr
	mov	%cr0, %eax
	or	$0x80000000, %eax
	mov	%eax, %cr0
	ljmpl	$0x18, $long
dead:	hlt
	jmp	dead

	.code64
long:
	mov	%ebp, %r15d
	shl	$32, %r15
	mov	$ghcb, %r14d
	mov	$stack_top, %esp
	mov	%edi, %r13d		# position of the C-bit

	mov	$0x002, %eax		# SEV information: versions that the hypervisor speaks
	xor	%edx, %edx
	call	msr_protocol
	mov	$check_protocol, %edi
	cmp	$0x001, %ax
	jne	fail
	shr	$48, %rax
	cmp	$2, %eax
	jb	fail
	mov	$0x080, %eax
	call	msr_protocol
	mov	%rax, %r12
	and	$0xfff, %eax
	cmp	$0x081, %eax
	jne	fail
	shr	$12, %r12		# hypervisor features
	test	$1, %r12b
	jz	fail

	mov	%r14, %rax		# the GHCB page: given up, shared, registered
	xor	%ecx, %ecx
	xor	%edx, %edx
	call	pvalidate
	lea	0x014(%r14), %eax
	mov	$2 << 20, %edx
	call	msr_protocol
	mov	$check_psc, %edi
	cmp	$0x015, %rax
	jne	fail
	lea	0x012(%r14), %eax
	xor	%edx, %edx
	call	msr_protocol
	mov	$check_protocol, %edi
	lea	0x013(%r14), %rcx
	cmp	%rcx, %rax
	jne	fail
	mov	%r14, %rdi
	xor	%eax, %eax
	mov	$512, %ecx
	rep stosq

	lea	text_up(%rip), %rsi
	call	say
	mov	%r13, %rax
	call	say_number
	lea	text_features(%rip), %rsi
	call	say
	mov	%r12, %rax
	call	say_number
	call	end_line

	# accept 16 MiB in 2M pages; the hypervisor may have mapped them by 4K
	mov	$accept_2m, %ebx
	mov	$8, %ecx
	mov	$0x200000, %ebp
	mov	$0x0110000000000000, %r8
	call	page_state_change
	xor	%r13d, %r13d		# of size mismatches
4:	mov	%rbx, %rax
	mov	$1, %ecx
	mov	$1, %edx
	.byte	0xf2, 0x0f, 0x01, 0xff	# PVALIDATE
	jc	bad_pvalidate
	test	%eax, %eax
	jz	6f
	cmp	$6, %eax		# FAIL_SIZEMISMATCH
	jne	bad_pvalidate
	inc	%r13d
	xor	%ebp, %ebp
5:	lea	(%rbx, %rbp), %rax
	xor	%ecx, %ecx
	mov	$1, %edx
	call	pvalidate
	add	$0x1000, %ebp
	cmp	$0x200000, %ebp
	jne	5b
6:	add	$0x200000, %ebx
	cmp	$accept_2m + 8 * 0x200000, %ebx
	jne	4b
	mov	$accept_2m, %ebx
	mov	$accept_2m + 8 * 0x200000, %ebp
	call	use_pages

	# accept 1 MiB in 4K pages, by buffers of 128
	mov	$accept_4k, %ebx
7:	mov	$128, %ecx
	mov	$0x1000, %ebp
	mov	$0x0010000000000000, %r8
	call	page_state_change
	add	$0x80000, %ebx
	cmp	$accept_4k + 0x100000, %ebx
	jne	7b
	mov	$accept_4k, %ebx
8:	mov	%rbx, %rax
	xor	%ecx, %ecx
	mov	$1, %edx
	call	pvalidate
	add	$0x1000, %ebx
	cmp	$accept_4k + 0x100000, %ebx
	jne	8b
	mov	$accept_4k, %ebx
	mov	$accept_4k + 0x100000, %ebp
	call	use_pages
	lea	text_accepted(%rip), %rsi
	call	say
	mov	%r13, %rax
	call	say_number
	call	end_line

	# share a page with the device that complements what it finds, and take it back
	mov	$exchange, %ebx
	mov	%rbx, %rax
	xor	%ecx, %ecx
	xor	%edx, %edx
	call	pvalidate
	mov	$1, %ecx
	mov	$0x1000, %ebp
	mov	$0x0020000000000000, %r8
	call	page_state_change
	movabs	$0x0123456789abcdef, %rax
	mov	%rax, shared + exchange
	mov	$exchange >> 12, %eax
	mov	$0xb0c00240, %ecx	# OUT, 4 bytes
	call	port
	movabs	$0x0123456789abcdef, %rax
	not	%rax
	mov	$check_device, %edi
	cmp	%rax, shared + exchange
	jne	fail
	mov	$1, %ecx
	mov	$0x0010000000000000, %r8
	call	page_state_change
	mov	%rbx, %rax
	xor	%ecx, %ecx
	mov	$1, %edx
	call	pvalidate
	mov	$exchange + 0x1000, %ebp
	call	use_pages
	lea	text_shared(%rip), %rsi
	call	say
	call	end_line

	mov	$check_secrets, %edi
	mov	secrets, %eax
	test	%eax, %eax
	jz	fail
	mov	secrets + 0x20, %rcx	# VMPCK0
	test	%rcx, %rcx
	jz	fail
	mov	%eax, %ebx
	lea	text_secrets(%rip), %rsi
	call	say
	mov	%rbx, %rax
	call	say_number
	lea	text_key(%rip), %rsi
	call	say
	call	end_line
	lea	text_done(%rip), %rsi
	call	say
	call	end_line
	xor	%edi, %edi
fail:					# EDI: the check, 0 if all went well
	mov	%edi, %eax
	shl	$16, %eax
	or	$0x2100, %eax		# termination, reason set 2
	xor	%edx, %edx
	call	msr_protocol
9:	hlt
	jmp	9b
bad_pvalidate:
	mov	$check_pvalidate, %edi
	jmp	fail

# PVALIDATE as RAX, ECX, EDX say; anything but a change is a failure.
pvalidate:
	.byte	0xf2, 0x0f, 0x01, 0xff
	jc	bad_pvalidate
	test	%eax, %eax
	jnz	bad_pvalidate
	ret

# Write and read back each 4K page of [RBX, RBP).
use_pages:
	mov	%rbx, %rax
1:	mov	%rax, (%rax)
	add	$0x1000, %rax
	cmp	%rbp, %rax
	jne	1b
	mov	$check_contents, %edi
	mov	%rbx, %rax
2:	cmp	%rax, (%rax)
	jne	fail
	add	$0x1000, %rax
	cmp	%rbp, %rax
	jne	2b
	ret

# GHCB MSR protocol: request EDX:EAX, response in RAX.
msr_protocol:
	mov	$msr_ghcb, %ecx
	wrmsr
	rep; vmmcall
	rdmsr
	shl	$32, %rdx
	or	%rdx, %rax
	ret

# Call through the GHCB page: exit code RAX, information RCX and RDX; RAX of the guest in R9.  EXITINFO2 in RAX.
vmgexit:
	mov	%rax, 0x390(%r14)
	mov	%rcx, 0x398(%r14)
	mov	%rdx, 0x3a0(%r14)
	mov	%r9, 0x1f8(%r14)
	lea	0x800(%r14), %rax
	mov	%rax, 0x3a8(%r14)
	movabs	$1 << 63, %rax
	mov	%rax, 0x3f0(%r14)
	movabs	$0xf << 50, %rax
	mov	%rax, 0x3f8(%r14)
	movw	$2, 0xffa(%r14)
	movl	$0, 0xffc(%r14)
	mov	$msr_ghcb, %ecx
	mov	%r14d, %eax
	xor	%edx, %edx
	wrmsr
	rep; vmmcall
	mov	0x3a0(%r14), %rax
	mov	$check_protocol, %edi
	cmpl	$0, 0x398(%r14)
	jne	fail
	ret

# OUT of EAX as ECX, an EXITINFO1, says.
port:
	mov	%eax, %r9d
	mov	$0x7b, %eax
	xor	%edx, %edx
	jmp	vmgexit

# Page state change of ECX pages from RBX on, RBP apart; R8: operation and size.
page_state_change:
	lea	0x800(%r14), %rdi
	lea	-1(%rcx), %eax
	shl	$16, %eax
	mov	%rax, (%rdi)
	mov	%rbx, %rax
	or	%r8, %rax
1:	add	$8, %rdi
	mov	%rax, (%rdi)
	add	%rbp, %rax
	dec	%ecx
	jnz	1b
	mov	$0x80000010, %eax
	xor	%ecx, %ecx
	xor	%edx, %edx
	call	vmgexit
	mov	$check_psc, %edi
	test	%rax, %rax
	jnz	fail
	movzwl	0x800(%r14), %eax	# every entry must be done: the current one is past the last
	cmp	0x802(%r14), %ax
	jbe	fail
	ret

# Text at RSI, up to a NUL, into the buffer of the line.  R11 is its length.
say:
	mov	line_length, %r11d
1:	mov	(%rsi), %al
	test	%al, %al
	jz	2f
	mov	%al, stack_line(%r11)
	inc	%rsi
	inc	%r11d
	jmp	1b
2:	mov	%r11d, line_length
	ret

# RAX in decimal.
say_number:
	sub	$32, %rsp
	lea	31(%rsp), %rsi
	movb	$0, (%rsi)
	mov	$10, %ecx
1:	xor	%edx, %edx
	div	%rcx
	add	$'0', %dl
	dec	%rsi
	mov	%dl, (%rsi)
	test	%rax, %rax
	jnz	1b
	call	say
	add	$32, %rsp
	ret

# The line goes to the debug console: REP OUTSB out of the shared buffer.
end_line:
	mov	line_length, %ecx
	movb	$'\n', stack_line(%rcx)
	inc	%ecx
	mov	%ecx, %edx
	mov	$stack_line, %esi
	lea	0x800(%r14), %rdi
	rep movsb
	movl	$0, line_length
	mov	$0x7b, %eax
	mov	$0x0402021c, %ecx	# port 402h, bytes, a string with REP
	xor	%r9d, %r9d
	jmp	vmgexit

	.set	stack_line, 0x811000	# the line is built in memory that was validated at launch
	.set	line_length, stack_line + 0x400

text_up:	.asciz	"payload up in 64-bit mode: C-bit "
text_features:	.asciz	", hypervisor features "
text_accepted:	.asciz	"accepted 8 2M pages and 256 4K pages, wrote and read back all; size mismatches: "
text_shared:	.asciz	"shared a page with a device and took it back"
text_secrets:	.asciz	"secrets page version "
text_key:	.asciz	", with a key for VMPL0"
text_done:	.asciz	"done"

	.balign	8
gdt:	.quad	0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
gdt_pointer:
	.word	31
	.long	gdt
