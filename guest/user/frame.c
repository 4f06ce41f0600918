// SPDX-License-Identifier: GPL-2.0
/*
 * frame INTERFACE COUNT: brings the interface up, sends COUNT frames to its own address and waits for each to come back
 * as it was sent. Ends with 0 when all did, else with 1 and one message.
 *
 * It stays on the processor where it begins: each has a queue of its own to send by, and only one queue keeps an order.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define LOCAL_EXPERIMENT 0x88b5
#define HEAD 14
#define SHORTEST 60
#define LONGEST 1514
#define WINDOW 8		/* sent before the first is waited for */
#define UP_SECONDS 10
#define BACK_SECONDS 10

static int longest = LONGEST;	/* with the head, as the interface has it */

static int failed(const char *what)
{
	printf("ERROR:%s: %s\n", what, strerror(errno));
	return 1;
}

/* Frame number i of this interface; its length. */
static size_t make(unsigned char *frame, const unsigned char *mac, long i)
{
	size_t length = SHORTEST + i * 97 % (longest - SHORTEST + 1);

	memcpy(frame, mac, 6);
	memcpy(frame + 6, mac, 6);
	frame[12] = LOCAL_EXPERIMENT >> 8;
	frame[13] = LOCAL_EXPERIMENT & 0xff;
	for (size_t k = HEAD; k < length; k++)
		frame[k] = i + k * 7;
	return length;
}

static int stay(void)
{
	cpu_set_t here;
	int cpu = sched_getcpu();

	if (cpu < 0)
		return -1;
	CPU_ZERO(&here);
	CPU_SET(cpu, &here);
	return sched_setaffinity(0, sizeof(here), &here);
}

/* Up, and running: what is sent before that goes nowhere. */
static int bring_up(int fd, struct ifreq *request)
{
	time_t end = time(NULL) + UP_SECONDS;

	if (ioctl(fd, SIOCGIFFLAGS, request))
		return -1;
	request->ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, request))
		return -1;
	do {
		if (ioctl(fd, SIOCGIFFLAGS, request))
			return -1;
		if (request->ifr_flags & IFF_RUNNING)
			return 0;
		usleep(1000);
	} while (time(NULL) < end);
	errno = ENETDOWN;
	return -1;
}

static int loop(int fd, const unsigned char *mac, long count)
{
	unsigned char frame[LONGEST], back[LONGEST + 1];
	long sent = 0;

	for (long i = 0; i < count; i++) {
		size_t length;
		ssize_t came;

		for (; sent < count && sent < i + WINDOW; sent++) {
			length = make(frame, mac, sent);
			if (send(fd, frame, length, 0) != (ssize_t)length)
				return failed("send");
		}
		came = recv(fd, back, sizeof(back), 0);
		if (came < 0)
			return failed("no frame came back");
		length = make(frame, mac, i);
		if ((size_t)came != length || memcmp(frame, back, length)) {
			printf("ERROR:frame %ld of %zu bytes came back as %zd others\n", i, length, came);
			return 1;
		}
	}
	printf("%ld frames came back\n", count);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(LOCAL_EXPERIMENT) };
	struct timeval patience = { .tv_sec = BACK_SECONDS };
	struct ifreq request = { 0 };
	unsigned char mac[6];
	long count = argc == 3 ? atol(argv[2]) : 0;
	int fd;

	if (count < 1) {
		printf("eg: frame eth0 100\n");
		return 1;
	}
	if (stay())
		return failed("cannot stay on one processor");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", argv[1]);
	/* Of the protocol of none, so that nothing is queued before it is bound. */
	fd = socket(AF_PACKET, SOCK_RAW, 0);
	if (fd < 0)
		return failed("socket");
	if (ioctl(fd, SIOCGIFHWADDR, &request))
		return failed("SIOCGIFHWADDR");
	memcpy(mac, request.ifr_hwaddr.sa_data, sizeof(mac));
	if (ioctl(fd, SIOCGIFINDEX, &request))
		return failed("SIOCGIFINDEX");
	address.sll_ifindex = request.ifr_ifindex;
	if (ioctl(fd, SIOCGIFMTU, &request))
		return failed("SIOCGIFMTU");
	if (request.ifr_mtu + HEAD < longest)
		longest = request.ifr_mtu + HEAD;
	if (bring_up(fd, &request))
		return failed("the link does not come up");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
		return failed("SO_RCVTIMEO");
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		return failed("bind");
	return loop(fd, mac, count);
}
