// SPDX-License-Identifier: GPL-2.0
/*
 * virtio NUMBER [COUNT]: sends NUMBER to the test device, COUNT times (default 1).
 * Ends with 0 when every request was answered, else with 1 and one message.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define DEVICE "/dev/virtio_misc"

/* Decimal digits only; -1 for anything else or above the limit. */
static long number(const char *text, long limit)
{
	long value = 0;

	if (!*text)
		return -1;
	for (; *text; text++) {
		if (*text < '0' || *text > '9')
			return -1;
		value = value * 10 + (*text - '0');
		if (value > limit)
			return -1;
	}
	return value;
}

static int usage(void)
{
	fputs("ERROR:please enter two parameters!\n"
	      "eg: ./virtio number\n"
	      "but the number between 0 and 255!\n", stderr);
	return 1;
}

int main(int argc, char **argv)
{
	long value, count = 1;
	unsigned char byte;
	int fd;

	if (argc < 2 || argc > 3)
		return usage();
	value = number(argv[1], 255);
	if (argc == 3)
		count = number(argv[2], 100000000);
	if (value < 0 || count < 1)
		return usage();

	fd = open(DEVICE, O_WRONLY | O_CLOEXEC);
	if (fd < 0) {
		fputs("ERROR:virtio_misc open failed!\n", stderr);
		return 1;
	}
	byte = value;
	while (count--) {
		if (write(fd, &byte, 1) != 1) {
			fputs("ERROR:write failed!\n", stderr);
			close(fd);
			return 1;
		}
	}
	close(fd);
	return 0;
}
