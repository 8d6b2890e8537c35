/*
 * t_tls - a BearSSL server against the stream, over a socket pair: what a server does with records after
 * the handshake that no library for Python can do
 */
#define main program_main
#include "../imap_backup.c"
#undef main
#include "unit.h"

/* CN=t, O=unit, and its key, on P-256 */
static const uint8_t certificate[] = {
	0x30, 0x82, 0x01, 0x9C, 0x30, 0x82, 0x01, 0x41, 0xA0, 0x03, 0x02, 0x01, 0x02, 0x02, 0x14, 0x18,
	0x4D, 0x3D, 0x70, 0x79, 0x1F, 0xB4, 0xD2, 0x72, 0x59, 0x6A, 0x79, 0x09, 0xFA, 0x24, 0x28, 0x8F,
	0xFE, 0xF7, 0xDB, 0x30, 0x0A, 0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x02, 0x30,
	0x1B, 0x31, 0x0D, 0x30, 0x0B, 0x06, 0x03, 0x55, 0x04, 0x0A, 0x0C, 0x04, 0x75, 0x6E, 0x69, 0x74,
	0x31, 0x0A, 0x30, 0x08, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0C, 0x01, 0x74, 0x30, 0x20, 0x17, 0x0D,
	0x32, 0x36, 0x31, 0x31, 0x32, 0x35, 0x31, 0x39, 0x34, 0x38, 0x34, 0x30, 0x5A, 0x18, 0x0F, 0x32,
	0x31, 0x32, 0x36, 0x31, 0x31, 0x30, 0x31, 0x31, 0x39, 0x34, 0x38, 0x34, 0x30, 0x5A, 0x30, 0x1B,
	0x31, 0x0D, 0x30, 0x0B, 0x06, 0x03, 0x55, 0x04, 0x0A, 0x0C, 0x04, 0x75, 0x6E, 0x69, 0x74, 0x31,
	0x0A, 0x30, 0x08, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0C, 0x01, 0x74, 0x30, 0x59, 0x30, 0x13, 0x06,
	0x07, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01, 0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03,
	0x01, 0x07, 0x03, 0x42, 0x00, 0x04, 0x9C, 0xD6, 0x19, 0x73, 0x31, 0x7B, 0xB8, 0xB7, 0xD4, 0x21,
	0xEA, 0xDB, 0x24, 0x51, 0x5B, 0x72, 0xED, 0x3F, 0x2F, 0x18, 0x39, 0x1A, 0x08, 0x9B, 0xF7, 0xD8,
	0x5B, 0x7E, 0x90, 0x4E, 0x12, 0xCF, 0xA1, 0xF4, 0x47, 0x90, 0xA7, 0x37, 0xCE, 0x69, 0x16, 0xE2,
	0xBB, 0x54, 0x83, 0xC8, 0xB2, 0xCF, 0x26, 0x92, 0x99, 0xE1, 0x33, 0xAC, 0x7B, 0x05, 0xC7, 0x4D,
	0xF4, 0xA4, 0x3C, 0x8B, 0xAC, 0xAC, 0xA3, 0x61, 0x30, 0x5F, 0x30, 0x1D, 0x06, 0x03, 0x55, 0x1D,
	0x0E, 0x04, 0x16, 0x04, 0x14, 0xD8, 0x66, 0xEB, 0x79, 0xD8, 0x9D, 0x84, 0x61, 0x92, 0x27, 0xA4,
	0x91, 0x52, 0xEF, 0x38, 0x00, 0xBC, 0x71, 0x0B, 0x8C, 0x30, 0x1F, 0x06, 0x03, 0x55, 0x1D, 0x23,
	0x04, 0x18, 0x30, 0x16, 0x80, 0x14, 0xD8, 0x66, 0xEB, 0x79, 0xD8, 0x9D, 0x84, 0x61, 0x92, 0x27,
	0xA4, 0x91, 0x52, 0xEF, 0x38, 0x00, 0xBC, 0x71, 0x0B, 0x8C, 0x30, 0x0F, 0x06, 0x03, 0x55, 0x1D,
	0x13, 0x01, 0x01, 0xFF, 0x04, 0x05, 0x30, 0x03, 0x01, 0x01, 0xFF, 0x30, 0x0C, 0x06, 0x03, 0x55,
	0x1D, 0x11, 0x04, 0x05, 0x30, 0x03, 0x82, 0x01, 0x74, 0x30, 0x0A, 0x06, 0x08, 0x2A, 0x86, 0x48,
	0xCE, 0x3D, 0x04, 0x03, 0x02, 0x03, 0x49, 0x00, 0x30, 0x46, 0x02, 0x21, 0x00, 0xC4, 0xEC, 0x48,
	0xA3, 0x1F, 0x28, 0x08, 0x40, 0x39, 0xF6, 0xBB, 0xAC, 0xCB, 0xBE, 0x7F, 0x0A, 0x0D, 0xEC, 0x98,
	0xD8, 0x0C, 0x03, 0x2D, 0xD3, 0xE8, 0xC2, 0x5D, 0xC3, 0xD2, 0x48, 0x28, 0xA3, 0x02, 0x21, 0x00,
	0xD9, 0x84, 0x9A, 0xE9, 0x61, 0x4D, 0xDB, 0x67, 0x14, 0x4B, 0xF8, 0x44, 0x38, 0x91, 0x34, 0x73,
	0x21, 0xA7, 0xA6, 0x9A, 0xBB, 0xC5, 0x2B, 0x70, 0xB1, 0x04, 0xC6, 0xBB, 0xC9, 0x72, 0x5D, 0x31,
};
static const uint8_t secret[] = {
	0x1F, 0xB7, 0x44, 0x86, 0x07, 0xA9, 0xC7, 0x30, 0x79, 0x88, 0xFE, 0x7D, 0xA2, 0x82, 0x5B, 0x6D,
	0xC4, 0x6C, 0x28, 0x9F, 0xB2, 0x9A, 0xF2, 0xAA, 0xC7, 0xF7, 0xFD, 0xFE, 0x99, 0xFA, 0x85, 0x8C,
};

static void serve_records(br_ssl_server_context *server, int fd)
{
	br_ssl_engine_context *engine = &server->eng;
	unsigned char *octets;
	unsigned state;
	size_t n;
	ssize_t done;

	while ((state = br_ssl_engine_current_state(engine)) & (BR_SSL_SENDREC | BR_SSL_RECVREC)) {
		if (state & BR_SSL_SENDREC) {
			octets = br_ssl_engine_sendrec_buf(engine, &n);
			if ((done = write(fd, octets, n)) <= 0)
				_exit(0);
			br_ssl_engine_sendrec_ack(engine, (size_t)done);
		} else if (state & BR_SSL_SENDAPP) {
			return;
		} else {
			octets = br_ssl_engine_recvrec_buf(engine, &n);
			if ((done = read(fd, octets, n)) <= 0)
				_exit(0);
			br_ssl_engine_recvrec_ack(engine, (size_t)done);
		}
	}
	_exit(0);
}

static void serve_text(br_ssl_server_context *server, int fd, const char *text)
{
	size_t n;
	unsigned char *to = br_ssl_engine_sendapp_buf(&server->eng, &n);

	memcpy(to, text, strlen(text));
	br_ssl_engine_sendapp_ack(&server->eng, strlen(text));
	br_ssl_engine_flush(&server->eng, 0);
	serve_records(server, fd);
}

/* "a", then what is odd, then "b"; or something that is no certificate */
enum odd { EMPTY, RENEGOTIATE, JUNK };

static void serve(int fd, enum odd odd)
{
	static br_ssl_server_context server;
	static uint8_t buffer[BR_SSL_BUFSIZE_BIDI];
	uint8_t der[sizeof certificate], key[sizeof secret];
	br_x509_certificate chain = { memcpy(der, certificate, sizeof der), sizeof der };
	br_ec_private_key private = { BR_EC_secp256r1, memcpy(key, secret, sizeof key), sizeof key };

	signal(SIGPIPE, SIG_IGN);
	der[0] ^= odd == JUNK;
	br_ssl_server_init_full_ec(&server, &chain, 1, BR_KEYTYPE_EC, &private);
	br_ssl_engine_set_buffer(&server.eng, buffer, sizeof buffer, 1);
	br_ssl_server_reset(&server);
	serve_records(&server, fd);
	serve_text(&server, fd, "a");
	while (odd == EMPTY) { /* until the other side has enough */
		br_ssl_engine_flush(&server.eng, 1); /* a record without content */
		serve_records(&server, fd);
	}
	if (odd == RENEGOTIATE) {
		br_ssl_engine_renegotiate(&server.eng);
		serve_records(&server, fd);
	}
	serve_text(&server, fd, "b");
	while (read(fd, buffer, sizeof buffer) > 0)
		;
	_exit(0);
}

/* Connect to such a server; its pid. */
static pid_t begin(struct stream *s, const struct account *account, enum odd odd)
{
	int pair[2];
	pid_t pid;

	check(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
	pid = fork();
	if (pid == 0) {
		close(pair[0]);
		serve(pair[1], odd);
	}
	close(pair[1]);
	fcntl(pair[0], F_SETFL, O_NONBLOCK);
	*s = (struct stream){ .fd = pair[0], .account = account, .timeout_sec = 20 };
	return pid;
}

static bool fills(struct stream *s, char octet)
{
	return stream_fill(s) == 0 && *s->at++ == octet && s->at == s->end;
}

/* A name of so many attributes, of which some do not fit: it is cut, and nothing behind it is written. */
static void check_name_cut(unsigned attributes)
{
	static const uint8_t attribute[] = { 0x31, 11, 0x30, 9, DER_OID, 3, 0x55, 4, 10, 0x0C, 2, 'a', 'b' };
	uint8_t der[50 * sizeof attribute];
	char out[22] = "";

	for (unsigned i = 0; i < attributes; i++)
		memcpy(der + i * sizeof attribute, attribute, sizeof attribute);
	memset(out + 10, '#', 12);
	cert_name((struct der){ der, der + attributes * sizeof attribute }, out, 10);
	check(strncmp(out, "ab, ab, ab", 9) == 0 && out[9] == '\0' && out[10] == '#' && out[11] == '#' &&
	      out[12] == '#', "a name of %u attributes: %.22s", attributes, out);
}

/* Judge chains: "HOST CA-FILE CHAIN-IN-HEX" a line on standard input; say "ok" or what is wrong. */
static int judge_all(void)
{
	static char line[8 * CHAIN_OCTETS];
	char host[300], path[1000];
	int hex;

	log_to.level = LOG_ERROR;
	while (fgets(line, sizeof line, stdin) != NULL && sscanf(line, "%299s %999s %n", host, path, &hex) == 2) {
		struct trust trust = { 0 };
		struct verifier *v = calloc(1, sizeof *v);
		unsigned octet;
		bool well;

		trust_load(&trust, path);
		v->trust = &trust;
		verifier_start_chain(&v->vtable, host);
		for (const char *p = line + hex; sscanf(p, "%2x", &octet) == 1; p += 2) {
			unsigned char c = (unsigned char)octet;

			verifier_append(&v->vtable, &c, 1);
		}
		well = verifier_end_chain(&v->vtable) == 0 && v->usages != 0;
		if (v->signatures > 32)
			printf("%u signatures: ", v->signatures);
		puts(well ? "ok" : v->err.code != E_NONE ? v->err.text : "key usage");
		free((void *)(uintptr_t)trust.anchors.at);
		free(v);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct account account = { .host = "t.", .pins = 1 };
	struct trust own = { .anchors = { certificate, certificate + sizeof certificate } };
	struct stream s;
	br_sha256_context hash;
	char text[400];
	pid_t pid;

	for (unsigned n = 3; n <= 50; n++)
		check_name_cut(n);
	clock_sec = time(NULL);
	if (argc == 2 && strcmp(argv[1], "judge") == 0)
		return judge_all();
	br_sha256_init(&hash);
	br_sha256_update(&hash, certificate, sizeof certificate);
	br_sha256_out(&hash, account.pin[0]);

	pid = begin(&s, &account, EMPTY);
	check(stream_start_tls(&s, NULL) == 0 && fills(&s, 'a'), "pinned: %s", s.err.text);
	s.timeout_sec = 1;
	check(stream_fill(&s) != 0 && s.err.code == E_NET && strstr(s.err.text, "nothing for 1 seconds") != NULL,
	      "records without content: %s", s.err.text);
	stream_close(&s);
	waitpid(pid, NULL, 0);

	account.pins = 0; /* the dot at its end is not the certificate's */
	pid = begin(&s, &account, RENEGOTIATE);
	check(stream_start_tls(&s, &own) == 0 && fills(&s, 'a'), "trusted: %s", s.err.text);
	check(strcmp(s.tls->client.eng.server_name, "t") == 0, "SNI %s", s.tls->client.eng.server_name);
	tls_describe(&s, text, sizeof text);
	check(strstr(text, "TLS 1.2, ECDHE_ECDSA_WITH_") == text &&
	      strstr(text, "certificate of unit, t, issued by unit, t, valid until 21") != NULL &&
	      strstr(text, "\"tls_fingerprint\": \"55dfe04885033a90123a409f9b06c5b3c38835755289b25477ed5eb24fd0190c\"") != NULL, "%s", text);
	s.tls->verifier.usages = 77;
	check(!fills(&s, 'b'), "a renegotiation is refused, which BearSSL's server does not survive");
	check(s.tls->verifier.usages == 77, "certificates are judged once");
	stream_close(&s);
	waitpid(pid, NULL, 0);

	account.host = "u";
	pid = begin(&s, &account, EMPTY);
	check(stream_start_tls(&s, &own) != 0 && strstr(s.err.text, "is for t, not for u") != NULL, "%s", s.err.text);
	stream_close(&s);
	waitpid(pid, NULL, 0);

	pid = begin(&s, &account, JUNK);
	check(stream_start_tls(&s, &own) != 0 && strstr(s.err.text, "its certificate is none") != NULL, "%s", s.err.text);
	stream_close(&s);
	waitpid(pid, NULL, 0);
	return checked("t_tls");
}
