/*
 * bench_line - run a command, at the far end of a long line if asked for, and say what it took
 *
 *     bench_line OUT RTT_MS MBIT COMMAND [ARGUMENT]...
 *
 * RTT_MS 0: the command runs as it is. Else it runs in a network namespace of its own, where its
 * only way out is a line to SERVER, an address that this gives to the namespace that it was called
 * in. MBIT limits the line in either direction (0: no limit).
 *
 * The line is a pair of TUN devices and a queue between them, for kernels without tc's netem. Without
 * a limit it passes the kernel's segments on as large as they come, up to 64 KiB, which costs less
 * than the TLS on them.
 *
 * OUT becomes one line of JSON: wall and CPU seconds, peak resident KiB of the largest process,
 * octets written (to anything but sockets), exit status; octets of TCP payload down and up the line,
 * and 'turns': how often the command spoke after it had heard something, at most.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SERVER "10.99.0.1"
#define CLIENT "10.99.0.2"

enum {
	HEADER = 10,           /* of virtio_net, in front of each packet */
	PACKETS = 1 << 15,     /* in the queue of a direction; a power of two */
	QUEUE_NS = 100000000   /* a limited line's own queue: what would wait longer is dropped */
};

struct packet {
	int64_t due;
	size_t n;
	uint8_t *octets;
};

struct direction {
	int from, to;
	uint64_t payload;
	int64_t busy_until;
	unsigned first, n;
	struct packet queue[PACKETS];
};

static int64_t delay_ns;
static double ns_an_octet;

static void die(const char *what)
{
	fprintf(stderr, "bench_line: %s: %s\n", what, strerror(errno));
	exit(2);
}

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void set(int s, struct ifreq *r, unsigned long what, const char *address)
{
	struct sockaddr_in in = { .sin_family = AF_INET };

	if (address != NULL) {
		inet_pton(AF_INET, address, &in.sin_addr);
		memcpy(&r->ifr_addr, &in, sizeof in);
	}
	if (ioctl(s, what, r) != 0)
		die(r->ifr_name);
}

/* A TUN device of the namespace that we are in. */
static int tun(const char *here, const char *there)
{
	struct ifreq r = { .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), s = socket(AF_INET, SOCK_DGRAM, 0);

	if (fd < 0 || ioctl(fd, TUNSETIFF, &r) != 0)
		die("/dev/net/tun");
	if (ns_an_octet == 0 && ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) != 0)
		die("TUNSETOFFLOAD");
	set(s, &r, SIOCSIFADDR, here);
	set(s, &r, SIOCSIFDSTADDR, there);
	r.ifr_qlen = 10000;
	set(s, &r, SIOCSIFTXQLEN, NULL);
	r.ifr_flags = IFF_UP | IFF_POINTOPOINT | IFF_RUNNING;
	set(s, &r, SIOCSIFFLAGS, NULL);
	close(s);
	return fd;
}

/* Octets of TCP payload in a packet of IPv4. */
static size_t payload(const uint8_t *p, size_t n)
{
	size_t ip, tcp;

	if (n < 40 || p[0] >> 4 != 4 || p[9] != IPPROTO_TCP)
		return 0;
	ip = (size_t)(p[0] & 15) * 4;
	tcp = (size_t)(p[ip + 12] >> 4) * 4;
	return n > ip + tcp ? n - ip - tcp : 0;
}

/* Take in what there is. Returns whether it had payload. */
static bool take(struct direction *d)
{
	static uint8_t octets[HEADER + 65536];
	bool any = false;
	ssize_t n;

	while (d->n < PACKETS && (n = read(d->from, octets, sizeof octets)) > HEADER) {
		struct packet *p = &d->queue[(d->first + d->n) % PACKETS];
		int64_t now = now_ns(), begin = d->busy_until > now ? d->busy_until : now;
		size_t net = payload(octets + HEADER, (size_t)n - HEADER);

		if (ns_an_octet > 0 && begin - now > QUEUE_NS)
			continue;
		d->payload += net;
		any = any || net > 0;
		d->busy_until = begin + (int64_t)((double)n * ns_an_octet);
		*p = (struct packet){ d->busy_until + delay_ns, (size_t)n, malloc((size_t)n) };
		memcpy(p->octets, octets, (size_t)n);
		d->n++;
	}
	return any;
}

/* Hand on what is due. Returns whether it had payload. */
static bool give(struct direction *d)
{
	bool any = false;

	for (; d->n > 0 && d->queue[d->first].due <= now_ns(); d->n--) {
		struct packet *p = &d->queue[d->first];
		ssize_t ignored = write(d->to, p->octets, p->n);

		(void)ignored; /* a device that is down: as on any line */
		any = any || payload(p->octets + HEADER, p->n - HEADER) > 0;
		free(p->octets);
		d->first = (d->first + 1) % PACKETS;
	}
	return any;
}

/* Run the line until the command has ended, *ended, and what it said last has arrived. */
static unsigned line(struct direction *up, struct direction *down, int pidfd, int64_t *ended)
{
	int64_t over = INT64_MAX;
	unsigned turns = 0;
	bool heard = true;

	while (now_ns() < over) {
		struct pollfd fds[] = { { .fd = up->from, .events = POLLIN }, { .fd = down->from, .events = POLLIN },
					{ .fd = over == INT64_MAX ? pidfd : -1, .events = POLLIN } };
		int64_t now = now_ns(), next = over < INT64_MAX ? over : now + 1000000000;
		struct timespec wait;

		if (up->n > 0 && up->queue[up->first].due < next)
			next = up->queue[up->first].due;
		if (down->n > 0 && down->queue[down->first].due < next)
			next = down->queue[down->first].due;
		next = next > now ? next - now : 0;
		wait = (struct timespec){ next / 1000000000, next % 1000000000 };
		ppoll(fds, 3, &wait, NULL);
		if (fds[2].revents != 0)
			over = (*ended = now_ns()) + 2 * delay_ns;
		if (take(up)) {
			turns += heard;
			heard = false;
		}
		take(down);
		give(up);
		heard = give(down) || heard;
	}
	return turns;
}

int main(int argc, char **argv)
{
	static struct direction up, down;
	unsigned long long written = 0;
	char path[64], text[100];
	unsigned turns = 0;
	struct rusage used;
	int64_t began, ended = 0;
	siginfo_t info;
	FILE *file;
	pid_t child;
	int status;

	if (argc < 5) {
		fputs("usage: bench_line OUT RTT_MS MBIT COMMAND [ARGUMENT]...\n", stderr);
		return 2;
	}
	delay_ns = (int64_t)(atof(argv[2]) * 500000);
	ns_an_octet = atof(argv[3]) > 0 ? 8000 / atof(argv[3]) : 0;
	if (delay_ns > 0) {
		down.from = up.to = tun(SERVER, CLIENT);
		if (unshare(CLONE_NEWNET) != 0)
			die("a network namespace");
		down.to = up.from = tun(CLIENT, SERVER);
	}
	began = now_ns();
	child = fork();
	if (child == 0) {
		execvp(argv[4], argv + 4);
		die(argv[4]);
	}
	if (delay_ns > 0)
		turns = line(&up, &down, (int)syscall(SYS_pidfd_open, child, 0), &ended);
	waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT);
	if (delay_ns == 0)
		ended = now_ns();
	/* Of a process not yet waited for, with all that it waited for itself. */
	snprintf(path, sizeof path, "/proc/%d/io", (int)child);
	file = fopen(path, "r");
	while (file != NULL && fgets(text, sizeof text, file) != NULL)
		if (strncmp(text, "wchar: ", 7) == 0)
			written = strtoull(text + 7, NULL, 10);
	if (wait4(child, &status, 0, &used) != child)
		die("wait");
	file = fopen(argv[1], "w");
	if (file == NULL)
		die(argv[1]);
	fprintf(file, "{\"wall\": %.6f, \"user\": %.6f, \"system\": %.6f, \"rss\": %ld, \"written\": %llu, "
		"\"status\": %d, \"down\": %llu, \"up\": %llu, \"turns\": %u}\n", (double)(ended - began) / 1e9,
		(double)used.ru_utime.tv_sec + (double)used.ru_utime.tv_usec / 1e6,
		(double)used.ru_stime.tv_sec + (double)used.ru_stime.tv_usec / 1e6, used.ru_maxrss,
		written, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
		(unsigned long long)down.payload, (unsigned long long)up.payload, turns);
	return fclose(file) == 0 ? 0 : 2;
}
