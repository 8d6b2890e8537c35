/*
 * drain - the limit that server, TLS and kernel set: reads what IMAP commands bring, and keeps nothing
 *
 *     drain ADDRESS PORT USER PASSWORD COMMAND...
 *
 * Logs in over TLS (BearSSL, AES-GCM), sends all commands at once and LOGOUT after them, and throws
 * away what comes. Prints how many octets came. It believes any certificate: it is a yardstick.
 * A COMMAND of the form @FILE stands for the file's octets: so it measures the other direction, too.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <bearssl.h>

static br_ssl_client_context client;
static br_x509_minimal_context chain;
static br_sslio_context io;
static br_x509_class believer;
static unsigned char buffer[BR_SSL_BUFSIZE_BIDI];

static unsigned believe(const br_x509_class **self)
{
	unsigned error = br_x509_minimal_vtable.end_chain(self);

	return error == BR_ERR_X509_NOT_TRUSTED ? 0 : error;
}

static int receive(void *fd, unsigned char *octets, size_t n)
{
	ssize_t got = read(*(int *)fd, octets, n);

	return got > 0 ? (int)got : -1;
}

static int transmit(void *fd, const unsigned char *octets, size_t n)
{
	ssize_t put = write(*(int *)fd, octets, n);

	return put > 0 ? (int)put : -1;
}

static void say(const char *tag, const char *command)
{
	br_sslio_write_all(&io, tag, strlen(tag));
	br_sslio_write_all(&io, command, strlen(command));
	br_sslio_write_all(&io, "\r\n", 2);
}

/* Throw away what has come. Returns how many octets, or 0 at the end. */
static unsigned long long discard(void)
{
	unsigned long long total = 0;
	char octet;
	size_t more;

	if (br_sslio_read(&io, &octet, 1) == 1)
		total++;
	/* The engine's own buffer is all that is needed: nothing is copied out of it. */
	if (total > 0 && br_ssl_engine_recvapp_buf(&client.eng, &more) != NULL) {
		br_ssl_engine_recvapp_ack(&client.eng, more);
		total += more;
	}
	return total;
}

/* Send a file's octets, and take in what comes meanwhile, or both sides might wait. */
static unsigned long long say_file(const char *path, int fd)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	unsigned long long total = 0;
	static char part[64 << 10];
	FILE *f = fopen(path, "rb");
	size_t n;

	if (f == NULL) {
		perror(path);
		exit(1);
	}
	while ((n = fread(part, 1, sizeof part, f)) > 0) {
		br_sslio_write_all(&io, part, n);
		while (poll(&ready, 1, 0) > 0 && br_ssl_engine_current_state(&client.eng) != BR_SSL_CLOSED)
			total += discard();
	}
	fclose(f);
	return total;
}

int main(int argc, char **argv)
{
	static const uint16_t suites[] = { BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
					   BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 };
	struct sockaddr_in address = { .sin_family = AF_INET };
	unsigned long long total = 0;
	char login[500], answer[4000] = "";
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	size_t n = 0;

	if (argc < 6 || inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) {
		fputs("usage: drain ADDRESS PORT USER PASSWORD COMMAND...\n", stderr);
		return 2;
	}
	address.sin_port = htons((uint16_t)atoi(argv[2]));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
		perror("drain: connect");
		return 1;
	}
	br_ssl_client_init_full(&client, &chain, NULL, 0);
	br_ssl_engine_set_versions(&client.eng, BR_TLS12, BR_TLS12);
	br_ssl_engine_set_suites(&client.eng, suites, sizeof suites / sizeof *suites);
	believer = br_x509_minimal_vtable;
	believer.end_chain = believe;
	chain.vtable = &believer;
	br_ssl_engine_set_buffer(&client.eng, buffer, sizeof buffer, 1);
	br_ssl_client_reset(&client, NULL, 0);
	br_sslio_init(&io, &client.eng, receive, &fd, transmit, &fd);
	snprintf(login, sizeof login, "LOGIN \"%s\" \"%s\"", argv[3], argv[4]);
	say("L ", login);
	br_sslio_flush(&io);
	while (n < sizeof answer - 1 && strstr(answer, "\nL ") == NULL) {
		int got = br_sslio_read(&io, answer + n, sizeof answer - 1 - n);

		if (got < 0)
			break;
		n += (size_t)got;
	}
	if (strstr(answer, "\nL OK") == NULL) {
		fprintf(stderr, "drain: no login (BearSSL says %d): %s\n",
			br_ssl_engine_last_error(&client.eng), answer);
		return 1;
	}
	for (int i = 5; i < argc; i++)
		if (argv[i][0] == '@')
			total += say_file(argv[i] + 1, fd);
		else
			say("A ", argv[i]);
	say("Z ", "LOGOUT");
	br_sslio_flush(&io);
	for (unsigned long long more; (more = discard()) > 0;)
		total += more;
	printf("%llu\n", total);
	return total > 0 ? 0 : 1;
}
