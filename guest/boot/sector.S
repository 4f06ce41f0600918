/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A disk that boots: the firmware reads sector 0 to 0x7c00 and jumps there. It prints
 * one line, reads sector 1 behind itself through the firmware, and prints the line that
 * stands there: so the disk was read by the loader's call too, not only to start it.
 *
 * It prints on the first serial port by port I/O, then halts for good.
 */
	.code16
	.globl _start
_start:
	ljmp	$0, $1f			/* some firmware comes as 07c0:0000 */
1:	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7c00, %sp
	movw	%dx, %bx		/* the drive; print needs %dx */
	movw	$first, %si
	call	print

	movb	%bl, %dl
	movb	$0x42, %ah		/* extended read from the drive in %dl */
	movw	$packet, %si
	int	$0x13
	movw	$failed, %si
	jc	2f
	movw	$second, %si
2:	call	print
3:	cli
	hlt
	jmp	3b

/* The text at %si to COM1, when its transmitter is ready for each byte. */
print:	lodsb
	testb	%al, %al
	jz	5f
	movb	%al, %ah
	movw	$0x3fd, %dx
4:	inb	%dx, %al
	testb	$0x20, %al
	jz	4b
	movw	$0x3f8, %dx
	movb	%ah, %al
	outb	%al, %dx
	jmp	print
5:	ret

/* One sector, to 0x7e00, from logical block 1. */
packet:	.byte	16, 0
	.word	1, second, 0
	.quad	1

first:	.asciz	"boot: sector 0 runs\r\n"
failed:	.asciz	"boot: sector 1 cannot be read\r\n"

	.org	510
	.word	0xaa55

second:	.asciz	"boot: sector 1 was read\r\n"
	.org	1024
