/*
 * t_imap - unit tests of imap_backup.c: what needs no server and no second process
 *
 * The IMAP parser reads through the stream: recv() and send() are replaced here. Prints what
 * failed and one summary line; exits 0 if nothing did.
 */
#include <sys/socket.h>
#include <unistd.h>

static ssize_t served(int fd, void *to, size_t n, int flags);
static ssize_t sent(int fd, const void *from, size_t n, int flags);

#define recv served
#define send sent
#define main program_main
#include "../imap_backup.c"
#undef main
#undef recv
#undef send
#include "unit.h"

#define N(table) (sizeof (table) / sizeof *(table))

static const char *said;  /* by the server */
static size_t said_octets, piece;
static char told[5000];   /* by the client, and by the callbacks */

static void tell(const char *format, ...)
	__attribute__((format(printf, 1, 2)));

static void tell(const char *format, ...)
{
	size_t n = strlen(told);
	va_list ap;

	va_start(ap, format);
	vsnprintf(told + n, sizeof told - n, format, ap);
	va_end(ap);
}

static ssize_t served(int fd, void *to, size_t n, int flags)
{
	(void)fd;
	(void)flags;
	n = n < piece ? n : piece;
	n = n < said_octets ? n : said_octets;
	memcpy(to, said, n);
	said += n;
	said_octets -= n;
	errno = ENOTTY; /* as any call may leave it */
	return (ssize_t)n;
}

static ssize_t sent(int fd, const void *from, size_t n, int flags)
{
	(void)fd;
	(void)flags;
	tell("%.*s", (int)n, (const char *)from);
	return (ssize_t)n;
}

/* ---- log ---- */

static void test_log(void)
{
	static const struct { const char *text, *visible; } texts[] = {
		{ "plain", "plain" }, { "a\r\nb\033[m\x7F", "a\\x0d\\x0ab\\x1b[m\\x7f" },
		{ "\xC3\xA9\xFF\xC2\x85", "\xC3\xA9\\xff\\xc2\\x85" }, { "", "" },
		{ "a\xE2\x80\x8B" "b", "a\\xe2\\x80\\x8bb" },         /* a space of no width */
		{ "\xE2\x80\xAE" "x", "\\xe2\\x80\\xaex" },           /* from right to left from here on */
		{ "\xF3\xA0\x81\x81", "\\xf3\\xa0\\x81\\x81" },      /* a tag */
		{ "\xF0\x9F\x98\x80 \xE2\x80\x93", "\xF0\x9F\x98\x80 \xE2\x80\x93" },
	};
	static const struct { const char *text; unsigned columns, fit, used; } fits[] = {
		{ "abc", 2, 2, 2 }, { "abc", 9, 3, 3 }, { "\xE4\xB8\xAD\xE6\x96\x87", 3, 3, 2 },
		{ "\xE4\xB8\xAD", 1, 0, 0 }, { "\xF0\x9F\x98\x80", 2, 4, 2 }, { "\xC3\xA4\xE2\x80\x93x", 2, 5, 2 },
		{ "\xFF\xFF", 3, 1, 2 }, { "", 1, 0, 0 },
	};
	static const struct { uint64_t octets; const char *text; } amounts[] = {
		{ 0, "0 B" }, { 999, "999 B" }, { 1000, "1 kB" }, { 999499, "999 kB" },
		{ 1300000, "1.3 MB" }, { 123456789, "123 MB" }, { UINT64_MAX, "18.4 EB" },
	};
	char out[64], amount[16];
	unsigned used;

	for (size_t i = 0; i < N(texts); i++) {
		log_visible(out, sizeof out, texts[i].text, strlen(texts[i].text));
		check(strcmp(out, texts[i].visible) == 0, "visible %zu: %s", i, out);
	}
	check(strlen(log_visible(out, 10, "\1\1\1\1", 4)) < 10, "visible in little room");
	for (size_t i = 0; i < N(fits); i++)
		check(log_fit(fits[i].text, fits[i].columns, &used) == fits[i].fit && used == fits[i].used,
		      "fit %zu: %u columns", i, used);
	for (size_t i = 0; i < N(amounts); i++)
		check(strcmp(log_octets(amount, amounts[i].octets), amounts[i].text) == 0,
		      "%llu octets: %s", (unsigned long long)amounts[i].octets, amount);
}

/* ---- config ---- */

/* What a part of the program says on stderr, between these two. */
static FILE *said_to;
static int said_before;

static void hear(void)
{
	said_to = tmpfile();
	said_before = dup(STDERR_FILENO);
	dup2(fileno(said_to), STDERR_FILENO);
}

static const char *heard(void)
{
	static char text[4000];

	fflush(stderr);
	dup2(said_before, STDERR_FILENO);
	close(said_before);
	rewind(said_to);
	text[fread(text, 1, sizeof text - 1, said_to)] = '\0';
	fclose(said_to);
	return text;
}

/* What config_load() says about a text; NULL: it was taken. */
static const char *complaints(struct config *c, const char *text)
{
	FILE *f = fopen("config.json", "w");
	const char *said_of_it;
	int result;

	fputs(text, f);
	fclose(f);
	hear();
	result = config_load(c, "config.json");
	said_of_it = heard();
	return result == 0 ? NULL : said_of_it;
}

#define EMAIL(email, more) "{\"destination\": \"d\", \"accounts\": [{\"email\": \"" email "\", \"host\": \"h\"" more "}]}"
#define ACCOUNT(more) EMAIL("a@x", more)
#define HOST(host) "{\"destination\": \"d\", \"accounts\": [{\"email\": \"a@x\", \"host\": \"" host "\"}]}"
#define TOP(more) "{\"destination\": \"d\", " more "\"accounts\": [{\"email\": \"a@x\", \"host\": \"h\", " \
	"\"password\": \"p\"}]}"
#define OAUTH(more) TOP("\"oauth2\": {\"work\": {\"client_id\": \"i\", " more "}}, ")
#define PIN "\"00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00112233445566778899AABBCCDDEEFF\""

static void config_free(struct config *c)
{
	json_free(c->root);
	free(c->accounts);
	free(c->oauths);
}

static void test_config(void)
{
	static const struct { const char *text, *complaint; } rows[] = {
		{ TOP(""), NULL },
		{ TOP("\"timeout\": null, \"success_url\": \"\", \"ca_file\": null, "), NULL },
		{ TOP("\"failure_url\": \"HTTPS://x/\", \"oauth2\": {}, "), NULL },
		{ "", "config.json:1:1: found " },
		{ "[]", ":1:1: found an array, expected an object" },
		{ "{}", "destination: missing or empty; expected a string" },
		{ "{}", "accounts: missing or empty; expected an array" },
		{ "{\"destination\": \"\", \"accounts\": []}", ":1:17: destination: missing or empty" },
		{ "{\"destination\": \"d\", \"accounts\": []}", "accounts: found 0 entries, expected 1 to 1000" },
		{ "{\"destination\": 1, \"accounts\": {}}", "destination: found a number, expected a string" },
		{ "{\"destination\": \"d\", \"accounts\": [1]}", "accounts[0]: found a number, expected an object" },
		{ TOP("\"timeout\": 0, "), "timeout: found 0, expected a whole number from 1 to 3600" },
		{ TOP("\"timeout\": 3601, "), "timeout: found 3601" },
		{ TOP("\"timeout\": 1e2, "), "timeout: found 1e2" },
		{ TOP("\"timeout\": -1, "), "timeout: found -1" },
		{ TOP("\"timeout\": 99999999999999999999, "), "timeout: found 99999999999999999999" },
		{ TOP("\"timeout\": \"9\", "), "timeout: found a string, expected a number" },
		{ TOP("\"total_processes\": 65, "), "from 1 to 64" },
		{ TOP("\"keep_duplicates\": 1, "), "keep_duplicates: found a number, expected true or false" },
		{ TOP("\"success_url\": \"ftp://x\", "), "success_url: found \"ftp://x\", expected a URL" },
		{ TOP("\"start_url\": \"secret.example.org/token\", "), "start_url: found \"secret.e\", expected" },
		{ TOP("\"start_url\": \"http:x\", "), "start_url: found \"http:x\", expected" },
		{ TOP("\"start_url\": \"http://x\", "), NULL },

		/* names of mailboxes, and attributes */
		{ TOP("\"ignore_mailboxes\": [\"a\", 2], "), "ignore_mailboxes[1]: found a number" },
		{ TOP("\"ignore_mailboxes\": [\"\\\\Junk\", \"\\\\all\", \"Junk\"], \"mailboxes\": [\"*\"], "), NULL },
		{ TOP("\"mailboxes\": [\"\\\\Junk\", \"\\\\Junks\"], "), "mailboxes[1]: found \"\\Junks\", expected" },
		{ TOP("\"mailboxes\": [], "), "mailboxes: found 0 entries, expected 1 to" },
		{ ACCOUNT(", \"mailboxes\": \"INBOX\""), "accounts[0].mailboxes: found a string, expected an array" },

		/* secrets, TLS, the host */
		{ ACCOUNT(""), NULL },
		{ ACCOUNT(", \"password\": 1234"), "accounts[0].password: found a number, expected a string" },
		{ ACCOUNT(", \"password\": \"p\", \"password_command\": \"c\""), "accounts[0]: expected only one of" },
		{ ACCOUNT(", \"password_command\": \"c\", \"ssl\": 1"), "ssl: found a number, expected true or" },
		{ ACCOUNT(", \"port\": 65536"), "port: found 65536, expected a whole number from 1 to 65535" },
		{ ACCOUNT(", \"tls_fingerprint\": []"), "tls_fingerprint: found 0 entries, expected 1 to 8" },
		{ ACCOUNT(", \"tls_fingerprint\": \"\""), "64 hex digits" },
		{ ACCOUNT(", \"tls_fingerprint\": \"00:1\""), "64 hex digits" },
		{ ACCOUNT(", \"tls_fingerprint\": [" PIN ", 1]"), "tls_fingerprint[1]: found a number, expected a string" },
		{ ACCOUNT(", \"tls_fingerprint\": \"0" PIN "\""), "expected ',' or '}'" },
		{ ACCOUNT(", \"tls_fingerprint\": " PIN), NULL },
		{ ACCOUNT(", \"tls_fingerprint\": [" PIN ", " PIN "]"), NULL },
		{ ACCOUNT(", \"tls_fingerprint\": [" PIN ", " PIN ", " PIN ", " PIN ", " PIN ", " PIN ", " PIN ", " PIN
			  ", " PIN "]"), "found 9 entries, expected 1 to 8" },
		{ HOST("imap.example.org:993"), "accounts[0].host: found \"imap.example.org:993\", expected a name" },
		{ HOST("imaps://imap.example.org"), "a port goes into \"port\", imaps:// is \"ssl\": true" },
		{ HOST("[::1]"), "found \"[::1]\"" },
		{ HOST("imap.example.org "), "found \"imap.example.org \"" },
		{ HOST("::1"), NULL },
		{ HOST("fe80::1%eth0"), NULL },
		{ HOST("imap.example.org."), NULL },

		/* folders and paths */
		{ ACCOUNT(", \"email\": \"\""), "this name again" },
		{ EMAIL("../x", ""), "accounts[0].email: \"../x\" cannot name a file" },
		{ EMAIL("a@x.", ""), "\"a@x.\" cannot name a file" },
		{ EMAIL("a\\nb", ""), "cannot name a file; expected 1 to 200 octets that can be seen" },
		{ EMAIL("a\xC2\x9B" "b", ""), "cannot name a file; expected 1 to 200 octets that can be seen" },
		{ EMAIL("a\xE2\x80\x8B@x", ""), "cannot name a file; expected 1 to 200 octets that can be seen" },
		{ EMAIL("\xC3\xA9@x", ""), NULL },
		{ EMAIL("", ""), "accounts[0].email: missing or empty; expected a string" },
		{ "{\"destination\": \"d\", \"accounts\": [\n{\"email\": \"a@x\", \"host\": \"h\", \"password\": "
		  "\"p\"},\n {\"email\": \"A@X\", \"host\": \"h\", \"password\": \"p\"}]}",
		  "config.json:3:12: accounts[1].email: \"A@X\" has the same folder as accounts[0].email" },
		{ TOP("\"ca_file\": \"~/ca.pem\", "), "ca_file: found \"~/ca.pem\", expected a path in full" },
		{ ACCOUNT(", \"ca_file\": \"~\""), "accounts[0].ca_file: found \"~\"" },

		/* keys that guard something, and others */
		{ TOP("\"require_mout\": true, "), "error: config.json:1:38: require_mout: unknown key; did you mean "
		  "\"require_mount\" at the top level?" },
		{ TOP("\"RequireMount\": true, "), "error: config.json:1:38: RequireMount: unknown key; did" },
		{ TOP("\"requiremounts\": true, "), "error: config.json:1:39: requiremounts: unknown key; did" },
		{ TOP("\"ssl\": true, "), "error: config.json:1:29: ssl: unknown key; did you mean \"ssl\" in an acc" },
		{ ACCOUNT(", \"SSL\": true"), "error: config.json:1:72: accounts[0].SSL: unknown key; did" },
		{ ACCOUNT(", \"tls_fingreprint\": " PIN), "did you mean \"tls_fingerprint\" in an account?" },
		{ ACCOUNT(", \"mailbox\": []"), "did you mean \"mailboxes\" in an account?" },
		{ ACCOUNT(", \"ca_flie\": \"x\""), "accounts[0].ca_flie: unknown key; did you mean \"ca_file\" in an" },
		{ ACCOUNT(", \"usrname\": \"x\", \"colour\": 1"), NULL },

		/* OAuth */
		{ OAUTH("\"type\": \"o365\""), NULL },
		{ OAUTH("\"type\": \"google\", \"redirect\": \"http://127.0.0.1:8080/\""), NULL },
		{ OAUTH("\"type\": \"o356\""), "oauth2.work.type: found \"o356\", expected one of: o365, google, custom" },
		{ OAUTH("\"tenant_id\": \"x\""), "oauth2.work.type: missing" },
		{ TOP("\"oauth2\": {\"work\": {\"type\": \"o365\"}}, "), "oauth2.work.client_id: missing" },
		{ TOP("\"oauth2\": {\"work\": []}, "), "oauth2.work: found an array, expected an object" },
		{ TOP("\"oauth2\": [], "), "oauth2: found an array, expected an object" },
		{ TOP("\"oauth2\": {\"a/b\": {\"type\": \"o365\", \"client_id\": \"i\"}}, "), "\"a/b\" cannot name a file" },
		{ OAUTH("\"type\": \"custom\", \"token_url\": \"https://x/t\", \"scope\": \"s\""),
		  "oauth2.work: expected \"auth_url\", \"token_url\" and \"scope\" with" },
		{ OAUTH("\"type\": \"custom\", \"auth_url\": \"https://x/a\", \"token_url\": \"https://x/t\", "
			"\"scope\": \"s\""), NULL },
		{ OAUTH("\"type\": \"o365\", \"token_url\": \"http://x/t\""),
		  "oauth2.work.token_url: found \"http://x\", expected a URL that begins with https" },
		{ OAUTH("\"type\": \"o365\", \"grant\": \"client_credentials\", \"client_secret\": \"s\""), NULL },
		{ OAUTH("\"type\": \"o365\", \"grant\": \"client_credentials\""), "oauth2.work: expected a \"client_secret\"" },
		{ OAUTH("\"type\": \"o365\", \"grant\": \"x\""), "grant: found \"x\", expected one of: user, client_cr" },
		{ ACCOUNT(", \"oauth2\": \"work\""), "accounts[0].oauth2: found \"work\", expected a name of the top-level" },
	};
	static const struct { const char *a, *b; unsigned distance; } words[] = {
		{ "host", "host", 0 }, { "hst", "host", 1 }, { "hosst", "host", 1 }, { "hosr", "host", 1 },
		{ "HOST", "host", 0 }, { "", "ab", 2 }, { "ab", "", 2 }, { "xost", "hos", 2 },
		{ "ohst", "host", 2 }, { "abcdef", "ghijkl", 3 }, { "", "abc", 3 }, { "hostabc", "host", 3 },
		{ "xhsot", "host", 3 },
	};
	char text[PATH_MAX_OCTETS];
	struct config c;

	for (size_t i = 0; i < N(rows); i++) {
		const char *said_of_it = complaints(&c, rows[i].text), *expected = rows[i].complaint;

		check((said_of_it == NULL) == (expected == NULL), "config %zu: %s", i, said_of_it);
		if (said_of_it != NULL && expected != NULL)
			check(strstr(said_of_it, expected) != NULL, "config %zu: %s not in %s", i, expected,
			      said_of_it);
		config_free(&c);
	}
	check(complaints(&c, ACCOUNT(", \"password\": \"p\", \"ssl\": true, \"processes_per_account\": 9"))
	      == NULL && c.accounts[0].port == 993 && c.accounts[0].processes == 2 && c.timeout_sec == 120 &&
	      c.retries == 6 && c.header_batch == 500 && c.email_batch == 50 && c.total_processes == 4 &&
	      strcmp(c.accounts[0].username, "a@x") == 0 && strcmp(c.oauth2_cache, ".") == 0, "defaults");
	config_free(&c);
	check(complaints(&c, ACCOUNT(", \"port\": 993")) == NULL && c.accounts[0].ssl == SSL_ON, "port 993");
	config_free(&c);
	check(complaints(&c, ACCOUNT("")) == NULL && c.accounts[0].ssl == SSL_UNSET && c.accounts[0].port == 143 &&
	      c.accounts[0].password == NULL, "port 143");
	config_free(&c);
	check(complaints(&c, "{\"destination\": \"d\", \"compress\": false, \"oauth2\": {\"work\": {\"type\": \"google\", "
			 "\"client_id\": \"i\"}}, \"accounts\": [{\"email\": \"a@x\", \"host\": \"h\", \"oauth2\": "
			 "\"work\"}]}") == NULL && c.accounts[0].ssl == SSL_ON && c.accounts[0].port == 993 &&
	      c.accounts[0].oauth == &c.oauths[0] && c.oauths[0].type == OAUTH_GOOGLE && strcmp(c.oauths[0].scope, "https://mail.google.com/") == 0 &&
	      !c.oauths[0].client_credentials && c.accounts[0].compress == COMPRESS_OFF, "OAuth");
	config_free(&c);
	snprintf(text, sizeof text, "{\"destination\": \"%0*d\"}", PATH_MAX_OCTETS / 2 + 1, 0);
	check(strstr(complaints(&c, text), "expected a path in full (~ is not expanded), not so long") != NULL, "a long path");
	config_free(&c);
	for (size_t i = 0; i < N(words); i++)
		for (unsigned letters = 0; letters < 3; letters++)
			check(config_near(words[i].a, words[i].b, letters) == (words[i].distance <= letters),
			      "%s and %s: %u", words[i].a, words[i].b, letters);
}

static void test_paths(void)
{
	struct config c;

	check(mkdir("sub", 0700) == 0, "a folder");
	complaints(&c, "{\"destination\": \"d/e\", \"ca_file\": \"/etc/ca\", \"accounts\": [{\"email\": \"a@x\", "
		       "\"host\": \"h\", \"ca_file\": \"ca\"}]}");
	config_free(&c);
	check(rename("config.json", "sub/config.json") == 0 && config_load(&c, "sub/config.json") == 0, "sub");
	check(strcmp(c.destination, "sub/d/e") == 0 && strcmp(c.ca_file, "/etc/ca") == 0 &&
	      strcmp(c.accounts[0].ca_file, "sub/ca") == 0 && strcmp(c.oauth2_cache, "sub") == 0,
	      "relative to the file's folder: %s, %s, %s", c.destination, c.accounts[0].ca_file, c.oauth2_cache);
	free((void *)(uintptr_t)c.destination);
	free((void *)(uintptr_t)c.accounts[0].ca_file);
	free((void *)(uintptr_t)c.folder);
	config_free(&c);
	unlink("sub/config.json");
	rmdir("sub");
}

/* ---- options ---- */

/* Take a command line whose words stand between blanks. */
static int take_options(struct options *o, const char *line, char words[400])
{
	char *argv[40] = { "imap_backup" };
	int argc = 1;

	snprintf(words, 400, "%s", line);
	for (char *word = strtok(words, " "); word != NULL; word = strtok(NULL, " "))
		argv[argc++] = word;
	memset(o, 0, sizeof *o);
	optind = 0; /* getopt_long() begins anew */
	log_to.level = LOG_INFO;
	return options_parse(o, argc, argv);
}

static void free_list(const struct json *list)
{
	const struct json *entry = list != NULL ? list->child : NULL, *next;

	for (; entry != NULL; entry = next) {
		next = entry->next;
		free((void *)(uintptr_t)(entry - 1));
	}
}

static void free_options(struct options *o)
{
	free_list(o->accounts);
	free_list(o->mailboxes);
}

static void test_options(void)
{
	static const struct { const char *line, *complaint; } rows[] = {
		{ "--nonsense", "unknown option" }, { "-x", "unknown option" }, { "--list=x", "unknown option" },
		{ "-a", "-a needs a value" }, { "--into", "--into needs a value" }, { "a b", "is enough: b" },
		{ "--list --check", "only one of --list and --check" }, { "--export a --export b", "only one of" },
		{ "--export a --export-all", "only one of --export and --export-all" },
		{ "--list --list", NULL }, { "--list -n", NULL }, { "-n --json", NULL }, { "--check -m x", NULL },
		{ "--online", "--online does not go together with a backup" }, { "--verify --online --json", NULL },
		{ "--yes", "--yes does not" }, { "--list --yes", "--yes does not go together with --list" },
		{ "--restore --yes --include-gone --into A/B -a a@x -m x -n --json c.json", NULL },
		{ "--verify --include-gone", "--include-gone does" }, { "--check --into x", "--into does not" },
		{ "--gone", "--gone does not" }, { "--export x --gone", "--gone does not go together with --export" },
		{ "--export-all --gone", NULL }, { "--export-all --json", "--json does not" },
		{ "--export x -n", "--dry-run does not" }, { "--authorize w --paste", NULL },
		{ "--paste", "--paste does not" }, { "--authorize w -a a@x", "--account does not" },
		{ "--authorize w -m x", "--mailbox does not" },
		{ "--host h", "needs --host, --user and --to" }, { "--user u --to d", "needs --host, --user and --to" },
		{ "--port 993", "needs --host" }, { "--password-command x", "needs --host" },
		{ "--host h --user u --to d", NULL }, { "--host h --user u --to d c.json", "c.json: a configuration" },
		{ "--host h --user u --to d --list -m x -n", NULL }, { "--host h --user u --to d --restore", NULL },
		{ "--host h --user u --to d --authorize w", "--host does not go together with --authorize" },
		{ "--host h --user u --to d --port 99x", "--port: found \"99x\", expected a number" },
		{ "--host h --user u --to d --port -1", "--port: found \"-1\"" },
	};
	struct options o;
	char words[400];

	for (size_t i = 0; i < N(rows); i++) {
		const char *said_of_it;
		int result;

		hear();
		result = take_options(&o, rows[i].line, words);
		said_of_it = heard();
		check(result == (rows[i].complaint == NULL ? -1 : 2) &&
		      strstr(said_of_it, rows[i].complaint != NULL ? rows[i].complaint : "") != NULL,
		      "options %s: %d, %s", rows[i].line, result, said_of_it);
		free_options(&o);
	}
	check(take_options(&o, "", words) == -1 && o.mode == RUN_BACKUP && strcmp(o.config_path, "config.json") == 0,
	      "no options");
	free_options(&o);
	check(take_options(&o, "c.json -nqa a@x --account=b@x -mINBOX --mailbox A/* -vvv", words) == -1 && o.dry &&
	      strcmp(o.config_path, "c.json") == 0 && log_to.level == LOG_TRACE && strcmp(o.accounts->child->text, "b@x") == 0 &&
	      strcmp(o.accounts->child->next->text, "a@x") == 0 && strcmp(o.mailboxes->child->text, "A/*") == 0 &&
	      strcmp(o.mailboxes->child->next->text, "INBOX") == 0 && o.mailboxes->child->next->next == NULL, "options");
	free_options(&o);
	check(take_options(&o, "--export <a@x> -q -- -c.json", words) == -1 && o.mode == RUN_EXPORT &&
	      strcmp(o.what, "<a@x>") == 0 && strcmp(o.config_path, "-c.json") == 0 && log_to.level == LOG_WARN,
	      "a file with a dash");
	free_options(&o);
	check(take_options(&o, "--export-all", words) == -1 && o.mode == RUN_EXPORT_ALL, "all of them");
	free_options(&o);
	log_to.level = LOG_INFO;
}

static void test_quick(void)
{
	static const struct { const char *line, *complaint; } rows[] = {
		{ "--host h:993 --user u@x --to d", "error: command line: accounts[0].host: found \"h:993\", expected" },
		{ "--host h --user ../u --to d", "command line: accounts[0].email: \"../u\" cannot name" },
		{ "--host h --user u@x --to ~/d", "command line: destination: found \"~/d\", expected a path" },
		{ "--host h --user u@x --to d --port 65536", "accounts[0].port: found 65536, expected a whole" },
		{ "--host h --user u@x --to d --port 0", "accounts[0].port: found 0" },
		{ "--host h --user u@x --to d\xE9", "command line: found octets that are no UTF-8 in --to" },
	};
	struct options o;
	struct config c;
	struct string shown;
	char words[400], cwd[300], expected[600];
	const char *said_of_it, *left;

	for (size_t i = 0; i < N(rows); i++) {
		take_options(&o, rows[i].line, words);
		hear();
		check(quick_load(&c, &o) == -1, "quick form %s", rows[i].line);
		said_of_it = heard();
		check(strstr(said_of_it, rows[i].complaint) != NULL, "quick form %s: %s", rows[i].line, said_of_it);
		config_free(&c);
		free_options(&o);
	}
	take_options(&o, "--host h --user u@x --to a\"b --password-command x", words);
	check(quick_load(&c, &o) == 0 && strcmp(c.destination, "a\"b") == 0 && c.accounts[0].ssl == SSL_ON &&
	      c.accounts[0].port == 993 && c.accounts[0].never_clear && c.timeout_sec == 120 &&
	      strcmp(c.accounts[0].email, "u@x") == 0 && strcmp(c.accounts[0].username, "u@x") == 0 &&
	      strcmp(c.accounts[0].password_command, "x") == 0 && c.accounts[0].password == NULL, "quick form");
	config_free(&c);
	setenv("IMAP_BACKUP_PASSWORD", "hidden", 1);
	left = getenv("IMAP_BACKUP_PASSWORD");
	check(quick_load(&c, &o) == 0 && strcmp(c.accounts[0].password, "hidden") != 0 &&
	      c.accounts[0].password_command == NULL, "quick form with a password in the environment");
	shown = secret_show(c.accounts[0].password);
	check(strcmp(shown.at, "hidden") == 0, "a secret is shown again");
	string_free(&shown);
	check(memcmp(left, "\0\0\0\0\0\0", 6) == 0, "the environment is wiped");
	free((void *)(uintptr_t)c.accounts[0].password);
	config_free(&c);
	hear();
	quick_hint(&o);
	said_of_it = heard();
	snprintf(expected, sizeof expected, "{\n  \"destination\": \"%s/a\\\"b\",\n  \"accounts\": [{\n"
		 "    \"email\": \"u@x\",\n    \"host\": \"h\",\n    \"password_command\": \"x\",\n    \"port\": 993,\n"
		 "    \"ssl\": true\n  }]\n}\n", getcwd(cwd, sizeof cwd));
	check(strstr(said_of_it, expected) != NULL, "the lines of config: %s", said_of_it);
	check(complaints(&c, strchr(said_of_it, '{')) == NULL && strcmp(c.accounts[0].host, "h") == 0, "they are one");
	config_free(&c);
	free_options(&o);
	take_options(&o, "--host h --user u@x --to d --port 143", words);
	check(quick_load(&c, &o) == 0 && c.accounts[0].ssl == SSL_UNSET && c.accounts[0].port == 143 &&
	      c.accounts[0].never_clear, "quick form with STARTTLS");
	config_free(&c);
	free_options(&o);
}

static void test_match(void)
{
	static const struct { const char *pattern, *text; bool match; } rows[] = {
		{ "", "", true }, { "", "a", false }, { "a", "", false }, { "a", "a", true }, { "a", "A", false },
		{ "*", "", true }, { "*", "abc", true }, { "a*", "abc", true }, { "*c", "abc", true },
		{ "*b", "abc", false }, { "a*c*", "abcabc", true }, { "a*b", "aXbYb", true }, { "**", "", true },
		{ "?", "", false }, { "?", "\xC3\xA9", true }, { "??", "\xC3\xA9", false }, { "*??", "\xE4\xB8\xAD", false }, { "?", "\xFF", true },
		{ "a?c", "abc", true }, { "a?", "a", false }, { "*?", "a", true }, { "a*a*a*a*b", "aaaaaaaaaaaa", false },
		{ "[a]", "[a]", true }, { "*", "a/b", true },
	};

	for (size_t i = 0; i < N(rows); i++)
		check(match(rows[i].pattern, rows[i].text) == rows[i].match, "match %s %s", rows[i].pattern,
		      rows[i].text);
}

/* ---- stream: certificates ---- */

/* CN=t; DNS:t, IP:127.0.0.1, IP:::1; an EC key */
static const char *const pem[] = { "-----BEGIN CERTIFICATE-----",
	"MIIBlTCCATugAwIBAgIUco/rCjUgc6N8/c0b7z6SKnRW1kcwCgYIKoZIzj0EAwIw",
	"DDEKMAgGA1UEAwwBdDAgFw0yNjExMjUwMzA3MzVaGA8yMTI2MTEwMTAzMDczNVow",
	"DDEKMAgGA1UEAwwBdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLr9pwdZguup",
	"hgTSbvl4xXIfQSYW/dC2AlfYy15CR2aaI1FfM8ZgzLmZ37jl285cN+C1vvKIuNGg",
	"nvbmm8G4/2ijeTB3MB0GA1UdDgQWBBQOPdSPQCBAao6vRVeQJ9uT2fdWGTAfBgNV",
	"HSMEGDAWgBQOPdSPQCBAao6vRVeQJ9uT2fdWGTAPBgNVHRMBAf8EBTADAQH/MCQG",
	"A1UdEQQdMBuCAXSHBH8AAAGHEAAAAAAAAAAAAAAAAAAAAAEwCgYIKoZIzj0EAwID",
	"SAAwRQIgX18M8e7sHvryx1LecJzk+J9qXOZe5h1iKCwxB7rn4ZUCIQCrEJzXSRxn",
	"c3xuvWT/fi3ZuzUZ3LlFFaRP6VtVeHUVHQ==",
	"-----END CERTIFICATE-----" };

static int trusted(const char *line_end, bool last_line_end, const char *before, const char *after)
{
	struct trust t = { .named = NULL };
	FILE *f = fopen("ca.pem", "w");
	struct cert c;
	int n = 0;

	fputs(before, f);
	for (size_t i = 0; i < N(pem); i++)
		fprintf(f, "%s%s", pem[i], i + 1 < N(pem) || last_line_end ? line_end : "");
	fputs(after, f);
	fclose(f);
	trust_read(&t, "ca.pem");
	for (struct der list = t.anchors; cert_next(&list, &c);)
		n++;
	free((void *)(uintptr_t)t.anchors.at);
	return t.err.code == E_NONE ? n : -1;
}

/* Everything that looks into a certificate looks into this one, for this host, and at its own constraints. */
static bool looked_at(const uint8_t *der, size_t n, const uint8_t *address, unsigned octets)
{
	static struct verifier v;
	struct der list = { der, der + n };
	struct err e = { 0 };
	char text[20];

	v.tag = NAME_ADDRESS;
	v.name = (struct der){ address, address + octets };
	if (!cert_next(&list, &v.leaf) || der_octets(list) > 0)
		return false;
	cert_name(v.leaf.subject, text, sizeof text);
	v.leaf.extension[X_CONSTRAINTS] = v.leaf.extension[X_NAMES];
	names_judge(v.leaf.extension[X_NAMES], &v.leaf);
	if (cert_decode(&v.leaf))
		issuer_judge(&v, &v.leaf, cert_signed(&v.leaf, v.leaf.key), &e);
	e.code = E_NONE;
	return host_judge(&v, &e) == 0;
}

static void test_certificates(void)
{
	static const uint8_t home[] = { 127, 0, 0, 1 }, away[] = { 127, 0, 0, 2 };
	uint8_t six[16] = { [15] = 1 }, der[1000];
	size_t n = 0;
	uint32_t bits = 0;
	unsigned digits_seen = 0;
	struct trust t = { .named = NULL };
	char longest[600];

	memset(longest, 'A', sizeof longest);
	memcpy(longest + sizeof longest - 2, "\n", 2);
	check(trusted("\n", true, "", "") == 1, "PEM");
	check(trusted("\r\n", true, "", "") == 1, "PEM with CRLF");
	check(trusted("\n", false, "", "") == 1, "PEM without a final line end");
	check(trusted(" \n", true, "# a comment\nIssuer: x = y\n", "more\n") == 1, "PEM in a text");
	check(trusted("\n", true, longest, "\n") == 1, "PEM behind a long line");
	check(trusted("\n", true, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "") == 1,
	      "PEM behind one that is none");
	check(trusted("\n", true, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "") == 1,
	      "PEM behind a key");
	check(trusted("\n", true, "-----BEGIN CERTIFICATE-----\nAAAA\n", "") == 1, "PEM that begins anew");
	trust_read(&t, "missing.pem");
	check(t.err.code == E_ACCOUNT, "no PEM file");
	t.err = (struct err){ 0 };
	trust_read(&t, "config.json");
	check(strstr(t.err.text, "no certificate") != NULL, "no PEM");
	free((void *)(uintptr_t)t.anchors.at);

	for (size_t i = 1; i + 1 < N(pem); i++)
		for (const char *p = pem[i]; *p != '\0' && *p != '='; p++) {
			static const char alphabet[] =
				"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

			bits = bits << 6 | (uint32_t)(strchr(alphabet, *p) - alphabet);
			if (++digits_seen % 4 != 1)
				der[n++] = (uint8_t)(bits >> (6 - 2 * ((digits_seen - 1) % 4)));
		}
	check(looked_at(der, n, home, 4), "127.0.0.1");
	check(!looked_at(der, n, away, 4), "127.0.0.2");
	check(looked_at(der, n, six, 16), "::1");
	six[0] = 1;
	check(!looked_at(der, n, six, 16), "100::1");
	for (size_t cut = 0; cut < n; cut++) {
		uint8_t *copy = memcpy(allocate(cut), der, cut);

		looked_at(copy, cut, home, 4); /* must not read past the end */
		free(copy);
	}
	for (size_t i = 0; i < n; i++) {
		uint8_t *copy = memcpy(allocate(n), der, n);

		for (unsigned bit = 0; bit < 8; bit++) {
			copy[i] = (uint8_t)(der[i] ^ 1u << bit);
			looked_at(copy, n, home, 4);
		}
		copy[i] = 0x84;
		looked_at(copy, n, home, 4);
		free(copy);
	}
}

/* ---- sets ---- */

static void test_sets(void)
{
	enum { MOST = 400 };
	static bool wanted[MOST + 2];
	static const struct { uint32_t low, high; } ends[] = { { UINT32_MAX, UINT32_MAX }, { 1, 1 },
		{ UINT32_MAX - 1, UINT32_MAX }, { 2, UINT32_MAX - 2 } };
	struct range taken[BATCH_RANGES];
	char text[SET_TEXT_OCTETS];
	struct set set = { 0 };

	for (unsigned seed = 1; seed <= 200; seed++) {
		unsigned count = 0;

		srand(seed);
		memset(wanted, 0, sizeof wanted);
		for (unsigned i = 0; i < seed; i++) {
			uint32_t low = 1 + (uint32_t)rand() % MOST, high = low + (uint32_t)rand() % 9;

			high = high <= MOST ? high : MOST;
			check(set_add(&set, low, high), "add");
			for (uint32_t uid = low; uid <= high; uid++)
				wanted[uid] = true;
			if (seed % 2 == 0 && i % 7 == 0)
				set_sort(&set);
		}
		set_sort(&set);
		for (uint32_t uid = 1, next; uid <= MOST; uid++) {
			count += wanted[uid];
			check((set_next(&set, uid) == uid) == wanted[uid], "seed %u: %u in the set", seed, uid);
			for (next = uid; next <= MOST && !wanted[next]; next++)
				;
			check(set_next(&set, uid) == (next <= MOST ? next : 0), "seed %u: next of %u", seed, uid);
		}
		check(set_count(&set) == count, "seed %u: count", seed);
		for (unsigned n; (n = set_take(&set, seed % 13 + 1, taken, text)) > 0;) {
			unsigned part = 0;

			check(strlen(text) < sizeof text, "length");
			for (unsigned i = 0; i < n; i++)
				for (uint32_t uid = taken[i].low; uid <= taken[i].high; uid++, part++) {
					check(wanted[uid], "seed %u: %u taken twice, or never added", seed, uid);
					wanted[uid] = false;
				}
			check(part <= seed % 13 + 1, "seed %u: too many taken", seed);
			count -= part;
		}
		check(count == 0 && set.n == 0, "seed %u: %u left", seed, count);
	}
	for (size_t i = 0; i < N(ends); i++)
		check(set_add(&set, ends[i].low, ends[i].high), "the ends");
	set_sort(&set);
	check(set.n == 1 && set_count(&set) == UINT32_MAX, "everything is one range");
	check(set_next(&set, UINT32_MAX) == UINT32_MAX && set_take(&set, UINT_MAX, taken, text) == 1, "the last");
	check(strcmp(text, "1:4294967295") == 0, "as text: %s", text);
	for (uint32_t i = 0; i < 1000; i++)
		set_add(&set, 4000000000u + 2 * i, 4000000000u + 2 * i);
	check(set_take(&set, UINT_MAX, taken, text) > 60 && strlen(text) < sizeof text, "a full line");
	set_free(&set);
	for (uint32_t i = 0; i < SET_RANGES_MAX; i++)
		if (!set_add(&set, 2 * i + 1, 2 * i + 1))
			check(false, "range %u", i);
	check(!set_add(&set, 2 * SET_RANGES_MAX + 1, 2 * SET_RANGES_MAX + 1), "a range too many");
	set_free(&set);
}

/* ---- imap ---- */

static int saw_list(void *context, const char *name, size_t n, char delimiter, bool selectable,
		    unsigned attributes)
{
	(void)context;
	tell("list %zu %.30s %c%s", n, name, delimiter != '\0' ? delimiter : '0', selectable ? "" : " no");
	tell(attributes != 0 ? " %x|" : "|", attributes);
	return 0;
}

static int saw_status(void *context, const char *name, const struct imap_status *s)
{
	(void)context;
	tell("status %s %u %u %u %u %llu %llu|", name, s->messages, s->uidnext, s->uidvalidity, s->unseen + 1,
	     (unsigned long long)s->highestmodseq, (unsigned long long)s->octets);
	return 0;
}

static int saw_uids(void *context, uint32_t low, uint32_t high)
{
	(void)context;
	tell("%u:%u|", low, high);
	return 0;
}

static int saw_literal(void *context, const struct imap_fetch *fetch)
{
	(void)context;
	tell("%u %llu<", (unsigned)fetch->section, (unsigned long long)fetch->octets);
	return 1;
}

static int saw_octets(void *context, const struct imap_fetch *fetch, const void *octets, size_t n)
{
	(void)context;
	(void)fetch;
	tell("%.*s", (int)n, (const char *)octets);
	return 0;
}

static int saw_fetch(void *context, const struct imap_fetch *fetch)
{
	(void)context;
	tell("> fetch %u", fetch->uid);
	if (fetch->has_flags)
		tell(" flags %x", fetch->flags);
	if (fetch->has_date)
		tell(" date %lld", (long long)fetch->date_sec);
	if (fetch->has_size)
		tell(" size %llu", (unsigned long long)fetch->size);
	tell("|");
	return 0;
}

static void serve(struct imap *im, const char *text, size_t n, size_t pieces)
{
	static struct account account = { .host = "example.org", .port = 143, .ssl = SSL_OFF };

	*im = (struct imap){ .flight = IMAP_FLIGHT_MAX - 8 };
	im->s = (struct stream){ .fd = -1, .account = &account, .timeout_sec = 1 };
	said = text;
	said_octets = n;
	piece = pieces;
	told[0] = '\0';
}

/*
 * What the callbacks see of responses, and how it ends: "|" after each; the code of the
 * command A1; then the error's text, if it is another than that the server hung up.
 */
static void test_responses(void)
{
	static const struct { const char *text, *seen, *error; } rows[] = {
		{ "* OK hi\r\nA1 OK done\r\n", "OK", NULL },
		{ "A1 NO [THROTTLED] later\r\n", "NO THROTTLED", NULL },
		{ "a1 bad [uidnext 5 x] y\n", "BAD UIDNEXT", NULL },
		{ "A1 OK [APPENDUID 1 2]\r\n", "OK APPENDUID", NULL },
		{ "A1 OK [BADCHARSET (\"a]b\" {1}\r\n] x)] t\r\n", "OK BADCHARSET", NULL },
		{ "* [COPYUID 1 2 3]\r\n[X]\r\nA1 OK\r\n", "OK", NULL },
		{ "A2 OK\r\n", "", "a line that begins with \"A2\"" },
		{ "A0 OK\r\n", "", "a line that begins with \"A0\"" },
		{ "A1x OK\r\n", "", "a line that begins with \"A1X\"" },
		{ "A99999999999999999999 OK\r\n", "", "a line that begins with" },
		{ "A1 OK\r\nA1 OK\r\n", "OK", "a line that begins with \"A1\"" },
		{ "A1 FINE\r\n", "", "sent FINE where OK, NO or BAD" },
		{ "\r\n \r\n\n* OK\r\n \r\nA1  OK  [X]  y \r\n", "OK X", NULL },
		{ "* OK [X \"]\" {3}\r\n]\r\n (] \"]\")] y\r\nA1 OK [X \"]\r\n", "OK X", NULL },
		{ "A1 OK [X\r\n", "OK X", NULL }, { "A1 NO [X]y\r\n", "NO X", NULL },
		{ "* OK [PERMANENTFLAGS (\\Seen [work a] b{ \"c \\*)] limited\r\nA1 OK\r\n", "OK", NULL },
		{ "* FLAGS (\\Seen [work a] b(c{ {1 \" %)\r\nA1 OK\r\n", "OK", NULL },
		{ "HTTP/1.1 400 Bad\r\n", "", "a line that begins with \"HTTP/1.1\"" },
		{ "* BYE Suggested Backoff Time: 9000 milliseconds\r\n", "", "ended the connection: Suggested" },
		{ "* BYE\r\n", "", "no reason given" },

		{ "* LIST (\\HasNoChildren) \"/\" INBOX\r\n", "list 5 INBOX /|", NULL },
		{ "* list (\\Noselect) NIL \"a \\\"b\\\\\"\r\n", "list 5 a \"b\\ 0 no|", NULL },
		{ "* LIST () \"\\\\\" {3}\r\na\r\n (\"x\" (1))\r\n", "list 3 a\r\n \\|", NULL },
		{ "* LIST () \"/\" {2}x\r\n* LIST () \"/\" {-1}\r\n", "list 0  /|list 0  /|", NULL },
		{ "* LIST () \".\" NIL\r\n", "list 3 NIL .|", NULL },
		{ "* LIST () \".\" \"\"\r\n", "list 0  .|", NULL },
		{ "* LIST () \"/\" a\tb c\r\n", "list 5 a\tb c /|", NULL },
		{ "* LIST (\\HasNoChildren) \"\\\\\" A (b)\\Year 1 \r\n", "list 12 A (b)\\Year 1 \\|", NULL },
		{ "* LIST () \"/\" a b (\"CHILDINFO\" (\"SUBSCRIBED\"))\r\n* LIST () \"/\" \"x\" y (z)\r\n",
		  "list 3 a b /|list 1 x /|", NULL },
		{ "*  LIST  ( \\All \\Archive\\x  \\sent \\Trash )  \"/\"  \" x\"  \r\n", "list 2  x / 31|", NULL },
		{ "* LIST (\\Archive \\Drafts \\Junk) NIL Nil\r\n", "list 3 Nil 0 e|", NULL },
		{ "* LIST (\\NonExistent\r\n* OK\r\n", "", "where a list of attributes was" },
		{ "* LIST \"/\" INBOX\r\n* OK\r\n", "", "where a list of attributes was" },
		{ "* LSUB () \"/\" x\r\n* XLIST ({2}\r\n)) x)\r\nA1 OK\r\n", "OK", NULL },

		{ "* STATUS {1}\r\nx (MESSAGES 2 UIDNEXT 3 UIDVALIDITY 4 UNSEEN 5 HIGHESTMODSEQ 6 SIZE 7) \r\n",
		  "status x 2 3 4 6 6 7|", NULL },
		{ "* STATUS x ()\r\n", "status x 0 0 0 0 0 0|", NULL },
		{ "* STATUS x (MESSAGES 4294967296 UIDNEXT -1 SIZE 9.3736e+06 X (1 (2)) UNSEEN 0)\r\n",
		  "status x 0 0 0 1 0 0|", NULL },
		{ "* STATUS x (HIGHESTMODSEQ 9223372036854775807)\r\n", "status x 0 0 0 0 9223372036854775807 0|",
		  NULL },
		{ "* STATUS x (HIGHESTMODSEQ 99999999999999999999)\r\n", "status x 0 0 0 0 0 0|", NULL },

		{ "* STATUS Year 1 (MESSAGES 5)\r\n* STATUS a (1) (MESSAGES 5)\r\n* STATUS x MESSAGES 5\r\n"
		  "* STATUS\r\n* STATUS \"a (MESSAGES 5)\r\n* STATUS {9 (MESSAGES 5) {3}\r\n)\r\n\r\nA1 OK\r\n", "OK", NULL },
		{ "*  STATUS  x  (  MESSAGES  2  X  UIDNEXT  3  )  \r\n", "status x 2 3 0 0 0 0|", NULL },
		{ "* STATUS x (MESSAGES 2 UIDNEXT 3\r\n* OK\r\n", "status x 2 3 0 0 0 0|", NULL },

		{ "* SEARCH\r\n* SEARCH 1 2 4294967295 (MODSEQ 5)\r\n", "1:1|2:2|4294967295:4294967295|", NULL },
		{ "* SEARCH 4294967296 1\r\n* SEARCH 99999999999999999999999999\r\n* SEARCH 0 2\r\n* SEARCH x 3\r\n",
		  "1:1|2:2|3:3|", NULL },
		{ "*  SEARCH  1  2 \t 3  \r\n", "1:1|2:2|3:3|", NULL },
		{ "* ESEARCH (TAG \"A7\") UID ALL 1:5,9,8:7\r\n", "1:5|9:9|8:7|", NULL },
		{ "* ESEARCH (TAG \"A7\") UID COUNT 5 MODSEQ 9\r\n", "", NULL },
		{ "* ESEARCH UID PARTIAL (1:500 4:20) ALL 3\r\n", "3:3|", NULL },
		{ "* ESEARCH UID ALL 1:,2,0:3,4:0,5:*,6\r\n", "2:2|6:6|", NULL },
		{ "* ESEARCH ) {1}\r\n\n ALL  3 ]\x7F\r\nA1 OK\r\n", "3:3|OK", NULL },
		{ "* CAPABILITY A \x7F B\r\n", "", NULL },

		{ "* 3 FETCH (UID 7 FLAGS (\\Seen $forwarded \\* x) RFC822.SIZE 5)\r\n",
		  "> fetch 7 flags 1001 size 5|", NULL },
		{ "* 3 FETCH (BODY[] {5}\r\na)\r\n) UID 7)\r\n", "1 5<a)\r\n)> fetch 7|", NULL },
		{ "* 3 FETCH (BODY[] ~{1+}\nx UID 7)\r\n", "1 1<x> fetch 7|", NULL },
		{ "* 3 FETCH (BODY[] \"a\\\"b\" UID 7)\r\n", "1 3<a\"b> fetch 7|", NULL },
		{ "* 3 FETCH (BODY[] {0}\r\n UID 7)\r\n", "1 0<> fetch 7|", NULL },
		{ "* 3 FETCH (UID 7 BODY[] NIL)\r\n* 4 FETCH (BODY[])\r\n", "1 0<> fetch 7|> fetch 0|", NULL },
		{ "* 3 FETCH (BODY[]<0> {1}\r\nx BODY[TEXT] {1}\r\ny body[] {1}\r\nz BODY[] {1}\r\n! UID 7)\r\n",
		  "1 1<z> fetch 7|", NULL },
		{ "* 3 FETCH (BODY[HEADER.FIELDS ({10}\r\nMessage-Id)] {2}\r\n\r\n UID 7)\r\n", "2 2<\r\n> fetch 7|",
		  NULL },
		{ "* 3 FETCH (BODY[HEADER.FIELDS (FROM TO CC DATE \"Subject\")] \"\")\r\n", "3 0<> fetch 0|", NULL },
		{ "* 3 UIDFETCH (FLAGS ())\r\n", "> fetch 3 flags 0|", NULL },
		{ "* 3 FETCH (INTERNALDATE \"17-Jul-1996 02:44:25 -0700\" UID 1)\r\n", "> fetch 1 date 837596665|",
		  NULL },
		{ "* 3 FETCH (INTERNALDATE NIL ENVELOPE (\"a\" {2}\r\n)( NIL (())) UID 1)\r\n", "> fetch 1|",
		  NULL },
		{ "* 3 FETCH (BINARY[1] {1}\r\nx UID 1)\r\n", "> fetch 1|", NULL },
		{ "* 3 FETCH (UID 4294967296)\r\n", "> fetch 0|", NULL },
		{ "* 3 FETCH (BODY[] {4294967296}\r\n", "", "announces a literal of 4294967296 octets" },
		{ "* 3 FETCH (BODY[] {99999999999999999999999}\r\n", "", "of 99999999999999999999999 octets" },
		{ "* 3 FETCH (BODY[] {1} \r\nx UID 7)\r\n", "1 1<x> fetch 7|", NULL },
		{ "* 3 FETCH (BODY[] {-1}\r\n", "", "a literal without a length" },
		{ "* 3 FETCH (BODY[] {1x}\r\n", "", "a literal without a length" },
		/* A literal whose length is wrong: its rest is no part of the response. */
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nxuid 8)\r\n", "1 1<x> fetch 8|", NULL },
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nxy)\r\n", "1 1<x", "sent Y where the end of FETCH" },
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nx\r\n-y)\r\n", "1 1<x", "something else where the end of FETCH" },
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nx\r\n* 4 FETCH (UID 8)\r\n", "1 1<x", "where the end of FETCH" },
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nx\r\nA1 OK\r\n", "1 1<x", "where the end of FETCH" },
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nx) y\r\n", "1 1<x", "Y where the end of FETCH" },
		{ "* 3 FETCH (UID 7) BODY[] {1}\r\nx\r\n* SEARCH 5\r\n", "1 1<x> fetch 7|5:5|", NULL },
		{ "* 3 FETCH (BODY[] {1}\r\nx FLAGS (a(b) c \\Seen) UID 7)\r\n", "1 1<x> fetch 7 flags 1|", NULL },
		{ "* 3 FETCH (BODY[] {1}\r\nx MODSEQ (9) X 9 UID 7)\r\n", "1 1<x> fetch 7|", NULL },
		{ "* 3 FETCH (UID 1\r\n* SEARCH 5\r\n", "> fetch 1|5:5|", NULL },
		/* A line end in the middle, a missing parenthesis, one too early, one in a keyword. */
		{ "* 3 FETCH (UID 7 BODY[] {1}\r\nx\r\n)\r\nA1 OK\r\n", "1 1<x> fetch 7|OK", NULL },
		{ "* 3 FETCH (BODY[] {1}\r\nx \r\n\r\n FLAGS (\\Seen)\n UID 7 )\r\nA1 OK\r\n",
		  "1 1<x> fetch 7 flags 1|OK", NULL },
		{ "* 3 FETCH (BODY[HEADER\r\nA1 OK\r\n", "> fetch 0|OK", NULL },
		{ "* 3 FETCH (FLAGS (\\Seen\r\n* 4 FETCH (X (\r\n+\r\n* 5 FETCH (UID 1\r\na1 OK\r\n",
		  "> fetch 0 flags 1|> fetch 0|+|> fetch 1|OK", NULL },
		{ "* 3 FETCH UID 1\r\n* OK\r\n", "> fetch 1|", NULL },
		{ "* 3 FETCH (UID 7) FLAGS (\\Seen) BODY[] {1}\r\n)\r\n* 4 FETCH (UID 8) BODY[] {1}\r\nx)\r\n",
		  "1 1<)> fetch 7 flags 1|1 1<x> fetch 8|", NULL },
		{ "* 3 FETCH (FLAGS (\\Seen [a] ]b {c {2 \"d %e (f $forwarded) UID 7)\r\n", "> fetch 7 flags 1001|", NULL },
		{ "* 3 FETCH (FLAGS (a(b) c \\Seen \\X) UID 7 BODY[] {1}\r\nx)\r\n", "1 1<x> fetch 7 flags 1|", NULL },
		{ "* 3 FETCH (FLAGS (a)b \\Flagged) UID 7 BODY[] {1}\r\nx)\r\n", "1 1<x> fetch 7 flags 4|", NULL },
		{ "* 3 FETCH (BINARY.SIZE[1] 5 X-NO 9 UID 7 X-Y (UID 8 (\"UID 8)\" NIL {2}\r\n))) UID 9) X))\r\n",
		  "> fetch 7|", NULL },
		{ "*  3  FETCH  (  FLAGS  ( )  UID  7  BODY [ ]  {1}\r\nx  )  \r\n", "1 1<x> fetch 7 flags 0|", NULL },
		{ "* 3 FETCH (FLAGS NIL X \"\\\")\" UID 7)\r\n", "> fetch 7|", NULL },
		{ "* 3 FETCH (BODY[] UID 7)\r\n", "> fetch 7|", NULL },
		{ "* X ((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((\r\nA1 OK\r\n", "OK", NULL },
		{ "+ go on\r\nA1 OK\r\n", "+|OK", NULL }, { "+\r\n", "+|", NULL },
	};

	for (size_t i = 0; i < N(rows); i++)
		for (size_t pieces = 1; pieces <= 1000; pieces = pieces < 4 ? pieces + 1 : pieces * 250) {
			static const char *const conditions[] = { "", "OK", "NO", "BAD" };
			struct imap_result *result;
			struct imap im;
			int got;

			serve(&im, rows[i].text, strlen(rows[i].text), pieces);
			im.tag = 1;
			im.on_list = saw_list;
			im.on_status = saw_status;
			im.on_uids = saw_uids;
			im.on_literal = saw_literal;
			im.on_octets = saw_octets;
			im.on_fetch = saw_fetch;
			while ((got = imap_response(&im)) >= 0)
				if (got == 1)
					tell("+|");
			result = &im.ring[1].result;
			tell("%s", conditions[result->condition]);
			if (result->condition != IMAP_PENDING && result->code[0] != '\0')
				tell(" %s", result->code);
			check(strcmp(told, rows[i].seen) == 0, "%s (%zu): %s", rows[i].text, pieces, told);
			check(strstr(im.s.err.text, rows[i].error != NULL ? rows[i].error : "closed by the server")
			      != NULL, "%s (%zu): %s", rows[i].text, pieces, im.s.err.text);
			stream_close(&im.s);
		}
}

/* Before somebody waits for a kind of response, it is passed over. */
static void test_unasked(void)
{
	static const char text[] = "* 1 FETCH (BODY[] {3}\r\n)\r\n UID 1)\r\n* LIST () NIL x\r\n* SEARCH 1\r\n"
		"* ESEARCH UID ALL 1\r\n* STATUS x ()\r\n* 5 UIDFETCH (FLAGS ())\r\n* 9 EXISTS\r\n* 2 EXPUNGE\r\n"
		"A1 OK [HIGHESTMODSEQ 5]\r\n";
	struct imap im;

	serve(&im, text, sizeof text - 1, 1);
	im.tag = 1;
	check(imap_wait(&im, 1) != NULL && im.exists == 8 && im.box.highestmodseq == 5,
	      "unasked: %s", im.s.err.text);
	stream_close(&im.s);
}

/* What nobody asked for comes to an end. */
static void test_noise(void)
{
	static const char *const endless[] = { "x", "* OK x\r\n", "* SEARCH\r\n", "* 1 EXISTS\r\n", "* X a ",
		"* 1 FETCH (UID 1)\r\n", "* 1 FETCH (BODY[TEXT] {4}\r\n1234)\r\n", "* OK [X ", "* LIST (\\x ",
		"\r\n", "* LIST () NIL x", "* 1 FETCH (UID 1) (", "* 1 FETCH (X (\"", "* X {1}\r\n" };
	size_t room = IMAP_NOISE_MAX + 1000, n;

	for (size_t i = 0; i < N(endless); i++) {
		char *text = allocate(room);
		struct imap im;

		for (n = 0; n + strlen(endless[i]) < room; n += strlen(endless[i]))
			memcpy(text + n, endless[i], strlen(endless[i]));
		serve(&im, text, n, SIZE_MAX);
		im.on_list = saw_list;
		im.on_literal = saw_literal;
		im.on_octets = saw_octets;
		im.on_fetch = saw_fetch;
		while (imap_response(&im) >= 0)
			told[0] = '\0';
		check(im.s.err.code == E_PROTO, "endless \"%s\": %s", endless[i], im.s.err.text);
		stream_close(&im.s);
		free(text);
	}
}

static void test_date(void)
{
	static const struct { const char *text; bool is; int64_t sec; } rows[] = {
		{ "17-Jul-1996 02:44:25 -0700", true, 837596665 }, { " 1-Jan-1970 00:00:00 +0000", true, 0 },
		{ "1-jan-1970 00:00:00 +0000", true, 0 }, { "31-DEC-1969 23:59:59 +0000", true, -1 },
		{ "29-Feb-2000 12:00:00 +0130", true, 951820200 }, { "29-Feb-1900 12:00:00 +0000", false, 0 },
		{ "31-Dec-9999 23:59:60 +0000", true, 253402300800 }, { "1-Mar-1900 00:00:00 +0000", true, -2203891200 },
		{ "1-Jan-1970 00:00:00 -0001", true, 60 }, { "1-Jan-1970 00:00:00 +0000 x", true, 0 },
		{ "", false, 0 }, { " ", false, 0 }, { "x", false, 0 }, { "NIL", false, 0 }, { "Wed", false, 0 }, { "1-", false, 0 },
		{ "00-Jan-0000 00:00:00 +0000", false, 0 }, { "01-Jan-0000 00:00:00 +0000", true, 946684800 },
		{ "0-Jan-1970 00:00:00 +0000", false, 0 }, { "32-Jan-1970 00:00:00 +0000", false, 0 },
		{ "31-Feb-1970 00:00:00 +0000", false, 0 }, { "31-Apr-1970 00:00:00 +0000", false, 0 },
		{ "31-Dec-1970 00:00:00 +0000", true, 31449600 }, { "1-Jan-1899 00:00:00 +0000", false, 0 },
		{ "1-Jam-1970 00:00:00 +0000", false, 0 }, { "1-Jan-1970 24:00:00 +0000", false, 0 },
		{ "1-Jan-1970 00:60:00 +0000", false, 0 }, { "1-Jan-1970 00:00:61 +0000", false, 0 },
		{ "1-Jan-1970 00:00:00 +9999", false, 0 }, { "1-Jan-1970 00:00:00 -1401", false, 0 },
		{ "1-Jan-1970 00:00:00 +0060", false, 0 }, { "1-Jan-1970 00:00:00 +", false, 0 },
		{ "1-Jan-1970 00:00:00 +9223372036854775807", false, 0 }, { "1234-Jan-1970 00:00:00 +0000", false, 0 },
		{ "1 Jan 1970 00:00:x", false, 0 }, { "1 Jan 1970 00:00 -0700", true, 25200 },
		{ "1-Jan-1970 00", false, 0 }, { "1-Jan-1970 00:00:00", true, 0 }, { "1-Jan-1970 00:00:00 -", false, 0 },
		{ "Wed, 17 Jul 1996 02:44:25 -0700 (PDT)", true, 837596665 }, { "17 Jul 96 02:44 PDT", true, 837596640 },
		{ "wed,17 july 1996  2:44:25 MST", true, 837596665 }, { "Wed 17 Jul 096 9:44:25 Z", true, 837596665 },
		{ "\r\n Wed, 17\r\n Jul 1996 09:44:25 GMT", true, 837596665 }, { "1 Jan 49 0:0 EST", true, 2493090000 },
		{ "1 Jan 1970 00:00:00 EDT", true, 14400 }, { "1 Jan 1970 00:00:00 E", true, 0 },
	};

	for (size_t i = 0; i < N(rows); i++) {
		int64_t sec = 0;

		check(parse_date(rows[i].text, &sec) == rows[i].is && (!rows[i].is || sec == rows[i].sec),
		      "date \"%s\": %lld", rows[i].text, (long long)sec);
	}
}

static void test_wait_asked(void)
{
	static const struct { const char *code, *text; unsigned sec; } rows[] = {
		{ "", "no", 0 }, { "THROTTLED", "", 5 }, { "OVERQUOTA", "", 60 }, { "NONEXISTENT", "", 0 },
		{ "", "Request is throttled. Suggested Backoff Time: 9000 milliseconds", 11 },
		{ "", "Backoff Time: 299961", 334 }, { "", "Backoff Time: 99999999999999999999", 900 },
		{ "", "Backoff Time: x", 1 }, { "", "Too many simultaneous connections. (Failure)", 5 },
		{ "", "Server Unavailable. 15", 5 },
	};

	for (size_t i = 0; i < N(rows); i++) {
		struct imap_result result = { .condition = IMAP_NO };

		snprintf(result.code, sizeof result.code, "%s", rows[i].code);
		snprintf(result.text, sizeof result.text, "%s", rows[i].text);
		check(imap_wait_asked(&result) == rows[i].sec, "wait %zu: %u", i, imap_wait_asked(&result));
	}
}

static void test_quote(void)
{
	static const struct { const char *text, *quoted; bool literal; } rows[] = {
		{ "", "\"\"", false }, { "a b", "\"a b\"", false }, { "\"\\", "\"\\\"\\\\\"", true },
		{ "\xC3\xA9", "\"\xC3\xA9\"", true }, { "&AOk-", "\"&AOk-\"", false },
		{ "\"\"\"\"\"\"\"\"\"\"\"\"\"\"", "\"\\\"\\\"\\\"\\\"\\\"\\\"\\\"\\\"\"", true },
	};
	static const unsigned able[] = { 0, CAP_LITERAL_PLUS, CAP_LITERAL_MINUS };
	char out[20], literal[40];

	for (size_t i = 0; i < N(rows); i++)
		for (size_t k = 0; k < N(able); k++) {
			struct imap im = { .capabilities = able[k] };
			const char *wanted = able[k] != 0 && rows[i].literal ? literal : rows[i].quoted;

			snprintf(literal, sizeof literal, "{%zu+}\r\n%s", strlen(rows[i].text), rows[i].text);
			check(strncmp(imap_quote(&im, out, sizeof out, rows[i].text), wanted, sizeof out - 1) == 0, "quoted: %s", out);
		}
	check(imap_needs_literal("a\nb", true) && imap_needs_literal("\xC3\xA9", true) && !imap_needs_literal("\"\\", true),
	      "literals");
}

static void test_capabilities(void)
{
	static const struct { const char *said; unsigned capabilities; uint64_t append_limit; } rows[] = {
		{ "* CAPABILITY\r\n", 0, 0 }, { "*  CAPABILITY  ID  literal-  x \x7F UIDPLUS\r\n", CAP_ID | CAP_LITERAL_MINUS, 0 },
		{ "* OK [CAPABILITY IMAP4rev1 QRESYNC APPENDLIMIT=35651584]\r\n", CAP_REV1 | CAP_QRESYNC | CAP_CONDSTORE, 35651584 },
		{ "* CAPABILITY IMAP4rev2 IMAP4rev1 APPENDLIMIT\r\n", CAP_REV1 | CAP_REV2, 0 },
		{ "* CAPABILITY IMAP4rev2 AUTH=PLAIN\r\n", CAP_REV2 | CAP_IN_REV2 | CAP_AUTH_PLAIN, 0 },
		{ "* CAPABILITY STARTTLS LOGINDISABLED AUTH=PLAIN SASL-IR LIST-STATUS ESEARCH CONDSTORE LITERAL+ STATUS=SIZE "
		  "COMPRESS=DEFLATE SPECIAL-USE NAMESPACE AUTH=XOAUTH2 AUTH=OAUTHBEARER\r\n",
		  CAP_STARTTLS | CAP_LOGINDISABLED | CAP_AUTH_PLAIN | CAP_SASL_IR | CAP_LIST_STATUS | CAP_ESEARCH |
		  CAP_CONDSTORE | CAP_LITERAL_PLUS | CAP_STATUS_SIZE | CAP_COMPRESS | CAP_SPECIAL_USE | CAP_NAMESPACE |
		  CAP_XOAUTH2 | CAP_OAUTHBEARER, 0 },
	};
	struct imap im;

	for (size_t i = 0; i < N(rows); i++) {
		serve(&im, rows[i].said, strlen(rows[i].said), 3);
		check(imap_response(&im) == 0 && im.capabilities == rows[i].capabilities && im.capabilities_known &&
		      im.append_limit == rows[i].append_limit, "capabilities %zu: %x", i, im.capabilities);
		stream_close(&im.s);
	}
	serve(&im, "* OK [CAPABILITY ID]\r\nA1 BAD what?\r\n", 37, 9);
	im.append_limit = 5;
	check(imap_response(&im) == 0 && im.append_limit == 0, "greeting");
	im.capabilities_known = false;
	check(imap_know_capabilities(&im) == 0 && im.capabilities_known && im.capabilities == CAP_ID &&
	      im.s.err.code == E_NONE,
	      "what the greeting told counts: %s", im.s.err.text);
	stream_close(&im.s);
}

/* What is said beside the answers: counts that are not known, and a limit. */
static void test_beside(void)
{
	static const char text[] = "* 3 EXPUNGE\r\n*  5  EXISTS\r\n* 1 EXPUNGE\r\n* NO [MESSAGELIMIT 1000 23221] x\r\n"
		"* OK [UIDNEXT 4294967296]\r\n* OK [UIDVALIDITY  7 ]\r\n";
	struct imap im;

	serve(&im, text, sizeof text - 1, 1);
	im.exists = UINT32_MAX;
	im.box.uidnext = 9;
	check(imap_response(&im) == 0 && im.exists == UINT32_MAX, "EXPUNGE of unknown: %u", im.exists);
	while (imap_response(&im) >= 0)
		;
	check(im.exists == 4 && im.below == 23221 && im.box.uidnext == 0 && im.box.uidvalidity == 7, "%u %u %u %u",
	      im.exists, im.below, im.box.uidnext, im.box.uidvalidity);
	stream_close(&im.s);
}

static void test_login(void)
{
	/* The password "t" is a token. */
	static const struct { unsigned capabilities; const char *user, *password, *said, *told; int code; } rows[] = {
		{ CAP_AUTH_PLAIN | CAP_SASL_IR, "u", "p", "A1 OK [CAPABILITY X] in\r\n",
		  "A1 AUTHENTICATE PLAIN AHUAcA==\r\n", E_NONE },
		{ CAP_AUTH_PLAIN | CAP_SASL_IR, "u", "pw", "A1 NO [AUTHENTICATIONFAILED] no\r\n",
		  "A1 AUTHENTICATE PLAIN AHUAcHc=\r\n", E_ACCOUNT },
		{ CAP_AUTH_PLAIN, "us", "pw", "+\r\nA1 NO [UNAVAILABLE] x\r\n",
		  "A1 AUTHENTICATE PLAIN\r\nAHVzAHB3\r\n", E_WAIT },
		{ CAP_AUTH_PLAIN, "us", "pw", "A1 BAD x\r\nA2 NO x\r\n",
		  "A1 AUTHENTICATE PLAIN\r\nA2 LOGIN \"us\" \"pw\"\r\n", E_ACCOUNT },
		{ CAP_AUTH_PLAIN | CAP_SASL_IR, "u", "p", "A1 NO [CANNOT] x\r\nA2 OK [CAPABILITY X] in\r\n",
		  "A1 AUTHENTICATE PLAIN AHUAcA==\r\nA2 LOGIN \"u\" \"p\"\r\n", E_NONE },
		{ CAP_AUTH_PLAIN | CAP_SASL_IR, "u", "p", "A1 NO x\r\n* BYE\r\n",
		  "A1 AUTHENTICATE PLAIN AHUAcA==\r\nA2 LOGIN \"u\" \"p\"\r\n", E_ACCOUNT },
		{ CAP_AUTH_PLAIN | CAP_SASL_IR | CAP_LOGINDISABLED, "u", "p", "A1 BAD x\r\n",
		  "A1 AUTHENTICATE PLAIN AHUAcA==\r\n", E_ACCOUNT },
		{ CAP_AUTH_PLAIN, "u", "t", "", "", E_ACCOUNT },
		{ CAP_XOAUTH2 | CAP_OAUTHBEARER | CAP_SASL_IR, "u", "t", "A1 OK [CAPABILITY X] in\r\n",
		  "A1 AUTHENTICATE XOAUTH2 dXNlcj11AWF1dGg9QmVhcmVyIHQBAQ==\r\n", E_NONE },
		{ CAP_XOAUTH2, "u", "t", "+ \r\n+ eyJzdGF0dXMiOiI0MDEifQ==\r\nA1 NO [AUTHENTICATIONFAILED] x\r\n",
		  "A1 AUTHENTICATE XOAUTH2\r\ndXNlcj11AWF1dGg9QmVhcmVyIHQBAQ==\r\n\r\n", E_ACCOUNT },
		{ CAP_OAUTHBEARER, "=,", "t", "+\r\n+ x\r\nA1 NO\r\n",
		  "A1 AUTHENTICATE OAUTHBEARER\r\nbixhPT0zRD0yQywBaG9zdD1oAXBvcnQ9OTkzAWF1dGg9QmVhcmVyIHQBAQ==\r\nAQ==\r\n",
		  E_ACCOUNT },
		{ CAP_LOGINDISABLED, "u", "p", "", "", E_ACCOUNT },
		{ 0, "u", "p\"", "A1 OK\r\n* CAPABILITY IDLE\r\nA2 OK\r\n", "A1 LOGIN \"u\" \"p\\\"\"\r\nA2 CAPABILITY\r\n",
		  E_NONE },
		{ 0, "u", "\xC3\xA9", "+ \r\n+\r\nA1 OK [CAPABILITY X]\r\n", "A1 LOGIN {1}\r\nu {2}\r\n\xC3\xA9\r\n", E_NONE },
		{ 0, "u", "\xC3\xA9", "A1 NO no literals\r\n", "A1 LOGIN {1}\r\n", E_ACCOUNT },
		{ 0, "u", "\xC3\xA9", "+ \r\nA1 BAD\r\n", "A1 LOGIN {1}\r\nu {2}\r\n", E_ACCOUNT },
		{ 0, "u", "p", "* BYE\r\n", "A1 LOGIN \"u\" \"p\"\r\n", E_NET },
	};
	static char user[502];

	for (size_t i = 0; i < N(rows); i++) {
		struct imap im;
		int result;

		serve(&im, rows[i].said, strlen(rows[i].said), 1);
		im.capabilities = rows[i].capabilities;
		im.s.account = &(struct account){ .host = "h", .port = 993 };
		result = imap_login(&im, rows[i].user, rows[i].password, rows[i].password[0] == 't');
		check((result == 0) == (rows[i].code == E_NONE) && (int)im.s.err.code == rows[i].code,
		      "login %zu: %d %s", i, (int)im.s.err.code, im.s.err.text);
		check(strcmp(told, rows[i].told) == 0, "login %zu: %s", i, told);
		stream_close(&im.s);
	}
	memset(user, '"', 500);
	for (int more = 0; more < 2; more++) {
		struct imap im;

		user[500] = more ? '"' : '\0';
		serve(&im, "A1 OK [CAPABILITY X]\r\n", 22, 9);
		im.s.account = &(struct account){ .host = "h" };
		check((imap_login(&im, user, "p", false) == 0) == !more, "a name of %d octets", 500 + more);
		check(strlen(told) == (more ? 0 : 1017), "%zu octets told", strlen(told));
		stream_close(&im.s);
	}
}

/* A process that is killed at any instruction takes no place with it, and leaves none too many. */
static void test_places(void)
{
	struct config config = { .total_processes = 2 };
	struct run run = { .config = &config, .shared = allocate_shared(sizeof *run.shared) };
	struct slot *slots = allocate_shared(3 * sizeof *slots);

	for (unsigned round = 0; round < 300; round++) {
		pid_t pid = fork();

		while (pid == 0) {
			place_pass(&run, NULL, slots);
			place_pass(&run, slots, NULL);
		}
		poll(NULL, 0, 1);
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		place_pass(&run, slots, NULL);
		check(place_pass(&run, NULL, slots) && place_pass(&run, NULL, slots + 1) &&
		      !place_pass(&run, NULL, slots + 2), "round %u: two places", round);
		check(place_pass(&run, slots, NULL) && place_pass(&run, slots + 1, NULL), "round %u: given back", round);
	}
	munmap(slots, 3 * sizeof *slots);
	munmap(run.shared, sizeof *run.shared);
}

static void test_base64(void)
{
	static const struct { const char *text, *coded, *url; } rows[] = {
		{ "", "", "" }, { "f", "Zg==", "Zg" }, { "fo", "Zm8=", "Zm8" }, { "foo", "Zm9v", "Zm9v" },
		{ "foob", "Zm9vYg==", "Zm9vYg" }, { "\xFB\xEF\xFF", "++//", "--__" },
	};
	char out[20];

	for (size_t i = 0; i < N(rows); i++) {
		check(strcmp(base64(out, rows[i].text, strlen(rows[i].text), "-_"), rows[i].url) == 0, "%s", out);
		check(strcmp(base64(out, rows[i].text, strlen(rows[i].text), "+/"), rows[i].coded) == 0, "%s", out);
		out[base64_decode((uint8_t *)out, out)] = '\0';
		check(strcmp(out, rows[i].text) == 0, "base64 %zu decoded: %s", i, out);
	}
	check(base64_decode((uint8_t *)out, "Zm9v\r\nZg==Zm9v") == 4 && memcmp(out, "foof", 4) == 0,
	      "up to its end, without what is no base64: %s", out);
}

static void test_scrub(void)
{
	static const struct { const char *text, *scrubbed; } rows[] = {
		{ "no", "no" }, { "hunter2", "*******" }, { "xHUNTER2x hunter2", "x*******x *******" }, { "x hunt", "x ****" },
		{ "x hun", "x hun" }, { "hunterhunter2", "hunter*******" }, { "aGk=", "****" },
	};
	struct imap im = { .secret = { "hunter2", "aGk=", NULL } };
	char text[40];

	for (size_t i = 0; i < N(rows); i++) {
		imap_scrub(&im, strcpy(text, rows[i].text));
		check(strcmp(text, rows[i].scrubbed) == 0, "scrub %zu: %s", i, text);
	}
}

/* ---- names ---- */

static void test_names(void)
{
	static const struct { const char *name; char delimiter; const char *file, *text, *original; } rows[] = {
		{ "INBOX", '/', "INBOX", "INBOX", "INBOX" }, { "inbox", '/', "INBOX", "INBOX", "inbox" },
		{ "Inbox/a", '/', "INBOX.a", "INBOX/a", "Inbox.a" }, { "a/inbox", '/', "a.inbox", "a/inbox", "a.inbox" },
		{ "a.b.c", '.', "a.b.c", "a/b/c", "a.b.c" }, { "a.b", '/', "a%2Eb", "a.b", "a.b" },
		{ "a.b", '\0', "a.b", "a.b", "a.b" }, { ".a.", '\0', "%2Ea%2E", ".a.", ".a." },
		{ " a ", '/', "%20a%20", " a ", " a " }, { "a b", '/', "a b", "a b", "a b" },
		{ "..", '/', "%2E%2E", "..", ".." }, { "../..", '/', "%2E%2E.%2E%2E", "../..", "....." },
		{ "a\\b", '\\', "a.b", "a/b", "a.b" }, { "a\\b", '/', "a%5Cb", "a\\b", "ab" },
		{ "a/b", '.', "a%2Fb", "a/b", "ab" }, { "a%b", '/', "a%25b", "a%b", "ab" },
		{ ":*?\"<>|", '/', "%3A%2A%3F%22%3C%3E%7C", ":*?\"<>|", "" },
		{ "&AOk-t&AOk-", '/', "\xC3\xA9t\xC3\xA9", "\xC3\xA9t\xC3\xA9", "AOk-tAOk-" },
		{ "&-", '/', "&", "&", "-" }, { "&2D3cqQ-", '/', "\xF0\x9F\x92\xA9", "\xF0\x9F\x92\xA9", "2D3cqQ-" },
		{ "&AC8-", '/', "%26AC8-", "&AC8-", "AC8-" }, { "&AC8ALg-", '/', "%26AC8ALg-", "&AC8ALg-", "AC8ALg-" },
		{ "&AAo-", '/', "%0A", "\n", "AAo-" }, { "&AIU-", '/', "%C2%85", "\xC2\x85", "AIU-" },
		{ "&AOk", '/', "%26AOk", "&AOk", "AOk" },
		{ "&AOk-&AOk-", '/', "%26AOk-%26AOk-", "&AOk-&AOk-", "AOk-AOk-" },
		{ "&AOk-&-", '/', "\xC3\xA9&", "\xC3\xA9&", "AOk--" }, { "&AOl-", '/', "%26AOl-", "&AOl-", "AOl-" },
		{ "&2D0-", '/', "%262D0-", "&2D0-", "2D0-" }, { "&3Kk-", '/', "%263Kk-", "&3Kk-", "3Kk-" },
		{ "&A-", '/', "%26A-", "&A-", "A-" }, { "\xC3\xA9", '/', "\xC3\xA9", "\xC3\xA9", "" },
		{ "\xFFx", '/', "%FFx", "\xFFx", "x" }, { "a\x7F", '/', "a%7F", "a\x7F", "a" },
		{ "/a", '/', "%2Ea", "/a", ".a" }, { "/inbox", '/', "%2Einbox", "/inbox", ".inbox" },
		{ "//a", '/', "%2E.a", "//a", "..a" }, { "a/", '/', "a.", "a/", "a." }, { "a//b", '/', "a..b", "a//b", "a..b" },
	};
	static char name[MBOX_NAME_MAX + 1], file[MBOX_NAME_MAX + 8], other[MBOX_FILE_MAX + 8];
	char text[NAME_OCTETS], decoded[NAME_OCTETS];
	const struct mailbox box = { .name = name, .delimiter = '/' };

	for (size_t i = 0; i < N(rows); i++) {
		mailbox_file(&(struct mailbox){ .name = (char *)(uintptr_t)rows[i].name, .delimiter = rows[i].delimiter }, file);
		check(strncmp(file, rows[i].file, strlen(rows[i].file)) == 0 &&
		      strcmp(file + strlen(rows[i].file), ".mbox") == 0, "file of %s: %s", rows[i].name, file);
		name_text(text, rows[i].name, rows[i].delimiter);
		check(strcmp(text, rows[i].text) == 0, "text of %s: %s", rows[i].name, text);
		name_file_original(file, rows[i].name, rows[i].delimiter);
		check(strncmp(file, rows[i].original, strlen(rows[i].original)) == 0 &&
		      strcmp(file + strlen(rows[i].original), ".mbox") == 0, "original of %s: %s", rows[i].name,
		      file);
	}
	/* Long ones are cut, at a character, and stay apart. */
	for (size_t n = 1; n <= MBOX_NAME_MAX; n++) {
		static const char *const forms[] = { "x", "&AOk-", "%", "\xE4\xB8\xAD" };

		for (size_t form = 0; form < N(forms); form++) {
			size_t octets = strlen(forms[form]), length;

			for (size_t i = 0; i < n; i++)
				name[i] = forms[form][i % octets];
			name[n] = '\0';
			mailbox_file(&box, file);
			length = strlen(file);
			check(length <= MBOX_FILE_MAX + 5, "%zu octets make %zu", n, length);
			for (size_t i = 0, part; i < length; i += part)
				if (!check((part = utf8_char((const uint8_t *)file + i, length - i, NULL)) > 0,
					   "%zu octets: cut within a character", n))
					break;
			if (form == 0 && n > MBOX_FILE_MAX) {
				check(length == MBOX_FILE_MAX + 5 && file[131] == '~', "cut: %s", file);
				name[n - 1] = 'y';
				mailbox_file(&box, other);
				check(strcmp(other, file) != 0, "two long names meet");
			}
		}
	}
	check(mutf7_decode(decoded, 7, "&AOkA6QDp-", 10) == 0, "no room for what is decoded");
	check(mutf7_decode(decoded, 11, "&AOkA6QDp-", 10) == 6, "room for what is decoded");
}

static void test_patterns(void)
{
	static const struct { const char *pattern, *name; bool matches; } rows[] = {
		{ "Trash", "Trash", true }, { "Trash", "INBOX/Trash/x", true }, { "trash", "Trash", false },
		{ "inbox", "INBOX", true }, { "INBOX", "Inbox/a", true }, { "INBOX", "a/inbox", true },
		{ "INBOX/a", "inbox/a", true }, { "a/b", "a/b", true }, { "a/b", "a/b/c", false }, { "a/*", "a/b/c", true },
		{ "\xC3\xA9*", "&AOk-t&AOk-", true }, { "?t?", "&AOk-t&AOk-", true }, { "&AOk", "&AOk", true },
		{ "*", "x", true }, { "", "x", false }, { "b*", "a/bc", true },
		{ "\\Junk", "x", true }, { "\\jUNK", "x", true }, { "\\Sent", "x", false },
	};
	struct mailbox box = { .delimiter = '/', .special = word_bit(special_uses, "\\Junk") };

	for (size_t i = 0; i < N(rows); i++) {
		struct json entry = { .type = JSON_STRING, .text = rows[i].pattern };
		struct json list = { .type = JSON_ARRAY, .child = &entry, .count = 1 };

		box.name = (char *)(uintptr_t)rows[i].name;
		check(name_matches(&list, &box) == rows[i].matches, "%s matches %s", rows[i].pattern, rows[i].name);
	}
	check(!name_matches(NULL, &box), "no patterns");
}

/* Is a listing complete? 1, 0; -1: an error. What is asked again is in todo. */
static void test_listing(void)
{
	static const struct { const char *said; int complete; uint32_t again; const char *error; } rows[] = {
		{ "* 5 EXISTS\r\n* SEARCH 1 3 2:4 7\r\nA1 OK\r\n", 1, 0, "" },
		{ "* 0 EXISTS\r\n* SEARCH\r\nA1 OK\r\n", 1, 0, "" },
		{ "* SEARCH 1\r\nA1 OK\r\n", 0, 0, "" }, /* EXISTS was not told: nothing is proved */
		{ "* 2 EXISTS\r\n* SEARCH 1\r\nA1 OK\r\n", 0, UINT32_MAX, "" },
		{ "* 1 EXISTS\r\n* SEARCH 1\r\n* SEARCH 1 2\r\n* 2 EXISTS\r\nA1 OK\r\n", 1, 0, "" },
		{ "A1 NO x\r\n", 0, UINT32_MAX, "" },
		{ "A1 NO [UNAVAILABLE] x\r\n", -1, 0, "listing the mails: the server says NO [UNAVAILABLE] x" },
		{ "* 3 EXISTS\r\n* SEARCH 9\r\nA1 OK [MESSAGELIMIT 1 9]\r\n", 0, 8, "" },
		{ "* 3 EXISTS\r\n* SEARCH 9\r\n* NO [MESSAGELIMIT 1 9] x\r\nA1 OK\r\n", 0, 8, "" },
		{ "* 1000000 EXISTS\r\n* ESEARCH UID ALL 1:1000000\r\nA1 OK\r\n", 1, 0, "" },
		{ "* ESEARCH UID ALL 1:1000001\r\nA1 OK\r\n", -1, 0, "more than 1000000 mails" },
		{ "* ESEARCH UID ALL 1:1000000,1000002\r\nA1 OK\r\n", -1, 0, "more than 1000000 mails" },
	};

	for (size_t i = 0; i < N(rows); i++) {
		struct imap im;
		struct session session = { .im = &im };
		struct sync y = { .session = &session, .awaited = 1, .pending = 1, .stage = SYNC_OVER };
		struct command *c;
		uint32_t again;

		serve(&im, rows[i].said, strlen(rows[i].said), 1000);
		im.tag = 1;
		im.ring[1].kind = KIND_LISTING;
		im.ring[1].owner = im.context = &y;
		im.ring[1].ranges = im.ranges[1];
		im.ring[1].ranges[0] = (struct range){ 1, UINT32_MAX };
		im.ring[1].n = 1;
		im.selected = true;
		im.exists = UINT32_MAX;
		im.on_uids = on_uids;
		c = imap_answer(&im);
		check((c != NULL ? sync_answered(&y, c) : -1) == (rows[i].complete < 0 ? -1 : 0), "listing %zu: %s", i,
		      y.err.text);
		again = y.todo[KIND_LISTING].n > 0 ? y.todo[KIND_LISTING].ranges[0].high : 0;
		check(y.complete == (rows[i].complete > 0) && again == rows[i].again, "listing %zu: %d %lu", i,
		      y.complete, (unsigned long)again);
		check(strstr(y.err.text, rows[i].error) != NULL, "listing %zu: %s", i, y.err.text);
		set_free(&y.listing);
		set_free(&y.todo[KIND_LISTING]);
		stream_close(&im.s);
	}
}

static void test_news(void)
{
	static const struct mbox_claim claim = { .uidvalidity = 7, .uidnext = 9, .messages = 3, .unseen = 1,
						 .traits = MBOX_NAME_MAX << 16 | 0xFE << 8 | 1 };
	static const struct imap_status status = { .known = true, .messages = 3, .uidnext = 9, .uidvalidity = 7,
						   .unseen = 1 };

	for (int i = 0; i < 17; i++) {
		struct mbox_info info = { .claim = claim, .fits = true, .others = 2 };
		struct mailbox box = { .delimiter = '\xFE', .special = 1, .prefix = MBOX_NAME_MAX };
		struct imap_status s = status;
		bool news = i > 3;

		switch (i) {
		case 1: s.highestmodseq = info.claim.highestmodseq = 5; s.unseen = 2; break;
		case 2: s.octets = 99; break;
		case 3: info.claim.when_sec = 99; break;
		case 4: s.known = false; break;
		case 5: s.uidvalidity = info.claim.uidvalidity = 0; break;
		case 6: s.uidnext = info.claim.uidnext = 0; break;
		case 7: s.uidnext++; break;
		case 8: s.messages--; break;
		case 9: s.unseen = info.claim.unseen = UINT32_MAX; break;
		case 10: s.unseen = 0; break;
		case 11: s.highestmodseq = 1; break;
		case 12: info.fits = false; break;
		case 13: s.uidvalidity++; break;
		case 14: box.delimiter = '.'; break;
		case 15: box.special = 2; break;
		case 16: box.prefix = 0; break;
		}
		box.status = s;
		check(mailbox_has_news(&box, &info, false) == news, "news %d", i);
		check(mailbox_has_news(&box, &info, true), "news %d with copies left out", i);
	}
}

int main(void)
{
	test_log();
	test_config();
	test_paths();
	test_options();
	test_quick();
	test_match();
	test_certificates();
	test_sets();
	test_responses();
	test_unasked();
	test_noise();
	test_date();
	test_wait_asked();
	test_quote();
	test_capabilities();
	test_beside();
	test_login();
	test_base64();
	test_places();
	test_scrub();
	test_names();
	test_patterns();
	test_listing();
	test_news();
	return checked("t_imap");
}
