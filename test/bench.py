#!/usr/bin/env python3
"""bench.py - how fast is it? Against drain (the limit), mbsync and whatever else is named

    test/bench.py [--scale F] [--rounds N] [--sets NAMES] [--lines NAMES] [--peer NAME=COMMAND]...
                  [--vs PROGRAM|REVISION] [--disk FOLDER] [--svg FILE] [--json FILE]
    test/bench.py growth [--vs PROGRAM|REVISION] [--scale F] [PATTERN]

A private Dovecot with generated mailboxes, over TLS: on loopback, and (as root) at the far end of a
line with 50 ms of round trip, which bench_line.c makes, in a network namespace. All clients
are measured by turns in each round; the table gives medians, and in brackets the ratio to drain.
Archives are written to /dev/shm, so that no disk is measured; --disk adds a first backup to a disk,
where fsync counts. --vs compares with another imap_backup, or with one that is built from a revision
of git: square brackets hold our ratio to it. "growth" is another table: what CPU and memory do when the
number of mails, names or mailboxes doubles (bench_growth.py). A peer's COMMAND is a shell line with {host} {port} {user} {password} {folder}
{ca} in it.
"""
import argparse
import ctypes
import glob
import imaplib
import json
import os
import platform
import random
import re
import shutil
import signal
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import fcntl
import socket

import bench_growth
import sample
import servers

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(TOP, 'build', 'bench')
LINES = {'loopback': (0, 0), '50ms': (50, 0), '20mbit': (50, 20)}   # ms of round trip, Mbit/s
FAR, NEAR = '10.99.0.1', '127.0.0.1'
STATUS = 'LIST "" "*" RETURN (STATUS (UIDVALIDITY UIDNEXT MESSAGES HIGHESTMODSEQ))'
MAILS = '(UID FLAGS INTERNALDATE BODY.PEEK[])'
IDS = '(UID FLAGS BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])'
FIGURES = (   # key, heading, format, whether its ratio to drain is worth a word
    ('wall', 'wall s', '%.3f', True), ('cpu', 'CPU s', '%.3f', True), ('rss', 'RSS KiB', '%.0f', False),
    ('down', 'in KB', '%.1f', True), ('up', 'out KB', '%.2f', False), ('waits', 'waits', '%.0f', False),
    ('connections', 'conn.', '%.0f', False), ('each', 'written/octet', '%.3f', False),
    ('syncs', 'fsyncs', '%.0f', False))


# -- what is on the server --

TEXT = sample.text(random.Random(7), 1_000_000)


def realistic(rng, i):
    """25 KB on average, of which deflate leaves a bit more than half: text, and attachments to each seventh."""
    if i % 7 == 0:
        return sample.with_attachment(rng, 'mail %d' % i, rng.choice((20_000, 60_000, 150_000)))
    at = rng.randrange(len(TEXT) - 30_000)
    return sample.mail(rng, 'mail %d' % i, TEXT[at:at + rng.choice((2000, 8000, 30_000))])


def mixed(scale):
    rng = random.Random(1)
    for k in range(20):
        yield 'INBOX' if k == 0 else 'Folder %d' % k, [realistic(rng, i) for i in range(max(20, int(500 * scale)))]


def single(scale):
    yield 'INBOX', sample.many(max(200, int(100_000 * scale)), 2, 1280)


def large(scale):
    rng = random.Random(3)
    yield 'INBOX', [sample.with_attachment(rng, 'large %d' % i, int(37_000_000 * scale)) for i in range(5)]


def folders(scale):
    """As the goal for a run without news has it: names of 20 octets."""
    for k in range(max(2, int(200 * scale))):
        yield 'INBOX' if k == 0 else 'Folder number %06d' % k, sample.many(500, 100 + k, 100)


def slow(scale):
    rng = random.Random(4)
    yield 'INBOX', [realistic(rng, i) for i in range(int(1200 * scale))]


def restored(scale):
    """Mails of up to 64 KB, the most that is sent before the server says that it takes it."""
    rng = random.Random(5)
    mails = [realistic(rng, i) for i in range(int(3000 * scale))]
    yield 'INBOX', [m for m in mails if len(m.data) < 64 << 10]


# Which phases on which lines.
SETS = {
    'mixed': (mixed, ('loopback', '50ms'), ('first', 'none', 'new', 'uidvalidity', 'index')),
    'single': (single, ('loopback', '50ms'), ('first', 'none', 'new', 'uidvalidity', 'index')),
    'large': (large, ('loopback', '50ms'), ('first',)),
    'folders': (folders, ('loopback', '50ms'), ('first', 'none', 'index')),
    'slow': (slow, ('20mbit',), ('first', 'none')),
    'restore': (restored, ('loopback', '50ms'), ('first', 'restore')),
}
# What it should be at most: set, line, phase, figure, whether as a ratio to drain, limit.
GOALS = (('folders', '50ms', 'first', 'wall', True, 1.5), ('folders', '50ms', 'index', 'wall', True, 2),
         ('mixed', '50ms', 'index', 'wall', True, 2), ('mixed', 'loopback', 'first', 'cpu', True, 1.6),
         ('mixed', '50ms', 'none', 'waits', False, 5), ('restore', '50ms', 'restore', 'wall', True, 1.3))
WHAT = {'first': 'first backup', 'none': 'no news', 'new': '100 new, 20 deleted',
        'uidvalidity': 'UIDVALIDITY of one mailbox new', 'index': 'index deleted', 'disk': 'first backup, to disk',
        'restore': 'restore of all'}


class Account:
    """A user of the server with one of the sets."""

    def __init__(self, dovecot, name, make, scale):
        self.dovecot, self.user = dovecot, name
        self.octets = self.mails = self.targets = 0
        self.boxes, self.make = [], lambda: make(scale)
        for box, mails in self.make():
            self.boxes.append(box)
            self._fill(box, mails)
        self.first_new = 1

    def _fill(self, box, mails):
        """Many mails with each APPEND (RFC 3502)."""
        with socket.create_connection((NEAR, self.dovecot.port)) as s, s.makefile('rb') as answers:
            def do(command, line=b''):
                s.sendall(command + b'\r\n')
                while not line.startswith(b'A '):
                    line = answers.readline()
                if not line.startswith(b'A OK'):
                    raise RuntimeError('Dovecot: %r' % line)
            answers.readline()
            do(b'A LOGIN %s %s' % (self.user.encode(), servers.PASSWORD.encode()))
            if box != 'INBOX':
                do(b'A CREATE "%s"' % box.encode())
            command, n = b'A APPEND "%s"' % box.encode(), 0
            for m in mails:
                part = b' (%s) %s {%d+}\r\n' % (m.flags.encode(), sample.internaldate(m.when).encode(), len(m.data))
                s.sendall((command if n == 0 else b'') + part + m.data)
                self.octets += len(m.data)
                self.mails += 1
                n = (n + 1) % 500
                if n == 0:
                    do(b'')
            do(b'' if n else b'A NOOP')
            do(b'A LOGOUT')

    def imap(self):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        imap = imaplib.IMAP4_SSL(NEAR, self.dovecot.tls, ssl_context=context)
        imap.login(self.user, servers.PASSWORD)
        return imap

    def change(self):
        """100 new mails and 20 deleted ones in the first mailbox."""
        imap = self.imap()
        rng = random.Random(os.urandom(8))
        status = imap.status('INBOX', '(UIDNEXT)')[1][0]
        self.first_new = int(re.search(rb'UIDNEXT (\d+)', status).group(1))
        new = list(sample.many(100, rng.getrandbits(40), 1280))
        assert len(sample.deliver(imap, 'INBOX', new)) == 100
        imap.select('INBOX')
        uids = imap.uid('SEARCH', '1:*')[1][0].split()
        some = b','.join(rng.sample(uids[:-100], 20)).decode()
        imap.uid('STORE', some, '+FLAGS.SILENT', '(\\Deleted)')
        imap.uid('EXPUNGE', some)
        imap.logout()

    def target(self):
        """Another user of the server, who has nothing yet."""
        self.targets += 1
        return '%s%d' % (self.user, self.targets)

    def appends(self, path):
        """Write what puts all mails into INBOX, with LITERAL+."""
        with open(path, 'wb') as f:
            for _, mails in self.make():
                for m in mails:
                    f.write(b'A APPEND INBOX (%s) %s {%d+}\r\n%s\r\n' % (
                        m.flags.encode(), sample.internaldate(m.when).encode(), len(m.data), m.data))
        return '@' + path

    def commands(self, phase):
        """What drain says: no client can do with less."""
        def in_each(boxes, what):
            return [c for box in boxes for c in ('EXAMINE "%s"' % box, what)]
        if phase in ('first', 'disk'):
            return in_each(self.boxes, 'UID FETCH 1:* ' + MAILS)
        if phase == 'new':
            return [STATUS] + in_each(self.boxes[:1], 'UID SEARCH RETURN (ALL) ALL') + \
                ['UID FETCH %d:* %s' % (self.first_new, MAILS)]
        return [STATUS] + in_each({'none': [], 'uidvalidity': self.boxes[:1], 'index': self.boxes}[phase],
                                  'UID FETCH 1:* ' + IDS)


# -- the clients: given account, phase, host and folder, a command line (None: it cannot) --

class Ours:
    def __init__(self, path, connections=1):
        self.path, self.connections = path, connections

    def command(self, bench, account, phase, host, folder):
        if phase == 'index':
            for path in glob.glob(os.path.join(folder, '*', '*.index')):
                os.unlink(path)
        config = folder + '.json'
        with open(config, 'w') as f:
            json.dump({'destination': folder, 'ca_file': bench.certificates.ca, 'total_processes': self.connections,
                       'processes_per_account': self.connections, 'accounts': [
                           {'email': account.user, 'host': host, 'port': bench.dovecot.tls, 'ssl': True,
                            'username': account.target() if phase == 'restore' else account.user,
                            'password': servers.PASSWORD}]}, f)
        os.chmod(config, 0o600)
        if phase == 'restore':
            return [self.path, '-v', '--restore', '--yes', config]
        return [self.path, '-v', config]

    def told(self, text):
        m = re.search(r'(\d+) connections?, (\d+) waits for an answer, (\d+) octets in, (\d+) out', text)
        return dict(connections=int(m.group(1)), waits=int(m.group(2)), down=int(m.group(3)) / 1000,
                    up=int(m.group(4)) / 1000) if m else {}


class Drain:
    def command(self, bench, account, phase, host, folder):
        restore = phase == 'restore'
        return [os.path.join(BUILD, 'drain'), host, str(bench.dovecot.tls),
                account.target() if restore else account.user, servers.PASSWORD,
                *([account.appends(folder + '.appends')] if restore else account.commands(phase))]

    def told(self, text):
        return {'down': int(text.split()[-1]) / 1000}


class Mbsync:
    def __init__(self, more=''):
        self.more = more

    def command(self, bench, account, phase, host, folder):
        if phase in ('index', 'uidvalidity', 'restore'):
            return None   # it gives up, or fetches everything twice
        os.makedirs(folder, exist_ok=True)
        fsync = 'FSync no\n' if self.more else ''
        with open(folder + '.rc', 'w') as f:
            f.write(fsync + 'IMAPAccount a\nHost %s\nPort %d\nUser %s\nPass %s\nSSLType IMAPS\n'
                    'SystemCertificates no\nCertificateFile %s\n%s\nIMAPStore far\nAccount a\n\n'
                    'MaildirStore near\nPath %s/\nInbox %s/INBOX\nSubFolders Verbatim\n\n'
                    'Channel c\nFar :far:\nNear :near:\nPatterns *\nCreate Near\nSync Pull\nSyncState *\n'
                    'CopyArrivalDate yes\n' % (host, bench.dovecot.tls, account.user, servers.PASSWORD,
                                               bench.certificate[0], self.more, folder, folder))
        return ['mbsync', '-q', '-c', folder + '.rc', 'c']

    def told(self, text):
        return {}


class Peer:
    def __init__(self, line):
        self.line = line

    def command(self, bench, account, phase, host, folder):
        if phase == 'restore':
            return None
        os.makedirs(folder, exist_ok=True)
        return ['sh', '-c', 'exec ' + self.line.format(
            host=host, port=bench.dovecot.tls, user=account.user, password=servers.PASSWORD,
            folder=folder, ca=bench.certificates.ca)]

    def told(self, text):
        return {}


def clients(peers, vs):
    found = {'drain': Drain(), 'imap_backup': Ours(os.path.join(TOP, 'imap_backup'))}
    if vs:
        found['the other'] = Ours(vs)
    static = os.path.join(TOP, 'build', 'imap_backup-' + platform.machine())
    if os.path.exists(static):
        found['static'] = Ours(static)
    found['2 connections'] = Ours(os.path.join(TOP, 'imap_backup'), 2)
    if shutil.which('mbsync'):
        found['mbsync'] = Mbsync()
        found['mbsync bare'] = Mbsync('DisableExtension COMPRESS=DEFLATE\n')
    found.update((name, Peer(line)) for name, line in (p.split('=', 1) for p in peers))
    return found


# -- measuring --

class Dovecot(servers.Dovecot):
    """Reachable through the line as well, with COMPRESS, and fast: many mails in a file."""

    def _config(self, *arguments):
        text = super()._config(*arguments).replace('listen = 127.0.0.1', 'listen = *')
        for old, new in (('maildir:~/Maildir:LAYOUT=fs', 'mdbox:~/mdbox'), ('= maildir', '= mdbox'),
                         ('mail_inbox_path = ~/Maildir\n', ''), ('~/Maildir', '~/mdbox')):
            text = text.replace(old, new)
        if 'dovecot_config_version' in text:
            return text   # COMPRESS is built in
        return text + 'mail_plugins = zlib\nprotocol imap {\n  mail_plugins = zlib imap_zlib\n}\n'

    def new_uidvalidity(self, user, mailbox='INBOX'):
        self.uidvalidity += 1
        servers.tool('doveadm', '-c', self.conf, 'mailbox', 'update', '-u', user, '--uid-validity',
                     str(self.uidvalidity), mailbox, env={'PATH': servers.SBIN})

    uidvalidity = 2_000_000_000


class Bench:
    def __init__(self, options, far):
        self.options, self.far = options, far
        self.work = tempfile.mkdtemp(prefix='imap_backup.bench.', dir='/dev/shm')
        os.chmod(self.work, 0o755)
        os.mkdir(os.path.join(self.work, 'archives'))
        servers.Certificates.KINDS['bench'] = (servers.Certificates.LOCAL + ',IP:' + FAR, -2, 800, 'ca')
        self.certificates = servers.Certificates(os.path.join(self.work, 'certificates'))
        self.certificate = self.certificates.make('bench')
        self.dovecot = Dovecot(os.path.join(self.work, 'dovecot'), self.certificate)
        self.clients = clients(options.peer, options.vs)
        if options.clients:
            self.clients = {k: v for k, v in self.clients.items() if k in options.clients.split(',')}
        self.results = {}   # (set, line, phase): {client: [figures]}

    def close(self):
        self.dovecot.stop()
        shutil.rmtree(self.work)

    def run(self, account, line, phase, client, folder, keep=True):
        """One run of one client; its figures."""
        host = NEAR if line == 'loopback' else FAR
        if phase in ('first', 'disk'):
            shutil.rmtree(folder, ignore_errors=True)
        command = self.clients[client].command(self, account, phase, host, folder)
        if command is None:
            return
        out = os.path.join(self.work, 'figures')
        done = subprocess.run([os.path.join(BUILD, 'line'), out, *map(str, LINES[line]), *command],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              env=dict(os.environ, HOME=self.work))
        text = done.stdout.decode(errors='replace')
        if done.returncode:
            raise SystemExit('%s: %s' % (command, text))
        with open(out) as f:
            got = json.load(f)
        if got.pop('status'):
            raise SystemExit('%s, %s, %s:\n%s\n%s' % (client, line, phase, ' '.join(command), text))
        got['cpu'] = got.pop('user') + got.pop('system')
        turns = got.pop('turns')
        if LINES[line][0]:
            got.update(down=got['down'] / 1000, up=got['up'] / 1000, waits=turns)
        else:
            got.pop('down'), got.pop('up')
        # What the program says counts payload inside TLS; the line sees TLS as well.
        got.update({k: v for k, v in self.clients[client].told(text).items() if k not in got or k == 'waits'})
        if phase in ('first', 'disk') and client != 'drain':
            if got['written']:   # else only root may read it
                got['each'] = got['written'] / account.octets
            self.complete(account, client, folder)
        if keep:
            self.results.setdefault((account.user, line, phase), {}).setdefault(client, []).append(got)

    def complete(self, account, client, folder):
        stored = sum(os.path.getsize(os.path.join(base, name)) for base, _, names in os.walk(folder)
                     for name in names)
        if stored < 0.97 * account.octets:   # the line ends are shorter
            raise SystemExit('%s has stored %d of %d octets' % (client, stored, account.octets))

    def warm(self, account):
        """Dovecot has looked at each mail and remembers what it is asked for."""
        for phase in ('index', 'first'):
            self.run(account, 'loopback', phase, 'drain', None, keep=False)

    def phase(self, account, line, phase):
        """Each client once."""
        if phase == 'new':
            account.change()
        elif phase == 'uidvalidity':
            self.dovecot.new_uidvalidity(account.user, account.boxes[0])
        order = list(self.clients)
        random.shuffle(order)
        for client in order:
            self.run(account, line, phase, client, os.path.join(self.work, 'archives', client.replace(' ', '_')))

    def measure(self):
        o = self.options
        for name in o.sets.split(','):
            make, lines, phases = SETS[name]
            say('%s: making the mails ...' % name)
            account = Account(self.dovecot, name, make, o.scale)
            self.warm(account)
            say('%s: %d mails, %.1f MB, %d mailboxes' % (name, account.mails, account.octets / 1e6,
                                                         len(account.boxes)))
            for line in lines:
                if line not in o.lines.split(',') or (LINES[line][0] and not self.far):
                    continue
                for _ in range(o.rounds):
                    for phase in phases:
                        self.phase(account, line, phase)
                for phase in phases:
                    self.table((name, line, phase))
            if o.disk and name in ('mixed', 'single'):
                self.to_disk(account)
            shutil.rmtree(self.dovecot.home(name))

    def to_disk(self, account):
        for client in self.clients:
            if client == 'drain':
                continue
            with tempfile.TemporaryDirectory(dir=self.options.disk) as folder:
                for _ in range(self.options.rounds):
                    self.run(account, 'loopback', 'disk', client, os.path.join(folder, 'archive'))
                if shutil.which('strace'):
                    self.count_syncs(account, client, os.path.join(folder, 'archive'))
        self.table((account.user, 'loopback', 'disk'))

    def count_syncs(self, account, client, folder):
        shutil.rmtree(folder, ignore_errors=True)
        log = os.path.join(self.work, 'strace')
        command = self.clients[client].command(self, account, 'disk', NEAR, folder)
        subprocess.run(['strace', '-f', '-qq', '-o', log, '-e', 'trace=fsync,fdatasync', *command],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(log) as f:
            n = sum('sync(' in text for text in f)
        for got in self.results[account.user, 'loopback', 'disk'][client]:
            got['syncs'] = n

    # -- telling --

    def median(self, key, client, figure):
        values = [r[figure] for r in self.results.get(key, {}).get(client, ()) if figure in r]
        return statistics.median(values) if values else None

    def table(self, key):
        name, line, phase = key
        if key not in self.results:
            return
        rows = [['%s, %s, %s' % (name, line, WHAT[phase])] + [f[1] for f in FIGURES]]
        for client in self.clients:
            if client not in self.results[key]:
                continue
            row = [client]
            for figure, _, form, ratio in FIGURES:
                value, base = self.median(key, client, figure), self.median(key, 'drain', figure)
                other = self.median(key, 'the other', figure) if client == 'imap_backup' else None
                row.append('' if value is None else form % value + (
                    ' (%.2f)' % (value / base) if ratio and base and client != 'drain' else '') + (
                    ' [%.2f]' % (value / other) if ratio and other else ''))
            rows.append(row)
        used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
        widths = [max(len(row[i]) for row in rows) for i in used]
        print()
        for row in rows:
            print('  '.join((row[i].ljust if i == 0 else row[i].rjust)(w) for i, w in zip(used, widths)).rstrip())
        sys.stdout.flush()


    def goals(self):
        print()
        for name, line, phase, figure, ratio, limit in GOALS:
            value = self.median((name, line, phase), 'imap_backup', figure)
            base = self.median((name, line, phase), 'drain', figure) if ratio else 1
            if value is not None and base:
                print('%s, %s, %s: %s %.2f%s, wanted %s: %s' % (
                    name, line, WHAT[phase], figure, value / base, ' of drain' * ratio, limit,
                    'good' if value / base <= limit else 'MISSED'))


def say(text):
    print('bench: ' + text, file=sys.stderr, flush=True)


def picture(bench, path):
    """Bars, each group by its own measure."""
    groups = [('%s, %s: %s' % (WHAT[phase], line, unit), (name, line, phase), figure, form)
              for name, line, phase, figure, unit, form in (
                  ('mixed', 'loopback', 'first', 'wall', 'seconds', '%.1f s'),
                  ('mixed', '50ms', 'first', 'wall', 'seconds', '%.1f s'),
                  ('mixed', '50ms', 'none', 'wall', 'seconds', '%.2f s'),
                  ('mixed', '50ms', 'new', 'wall', 'seconds', '%.2f s'),
                  ('slow', '20mbit', 'first', 'wall', 'seconds', '%.1f s'),
                  ('mixed', 'loopback', 'first', 'cpu', 'CPU seconds of the client', '%.2f s'),
                  ('large', 'loopback', 'first', 'rss', 'peak memory, KiB (five large mails)', '%.0f'))]
    out, y = [], 8
    for title, key, figure, form in groups:
        bars = [(c, bench.median(key, c, figure)) for c in bench.clients]
        bars = [(c, v) for c, v in bars if v is not None]
        if not bars:
            continue
        out.append('<text x="8" y="%d" font-weight="bold">%s</text>' % (y + 12, title))
        y += 18
        most = max(v for _, v in bars)
        for client, value in bars:
            out.append('<text x="120" y="%d" text-anchor="end">%s</text><rect x="126" y="%d" width="%.1f" '
                       'height="11" fill="%s"/><text x="%.1f" y="%d">%s</text>' % (
                           y + 10, client, y, max(1, 440 * value / most),
                           {'drain': '#999', 'imap_backup': '#26a', 'static': '#48c'}.get(client, '#c83' if 'mbsync'
                                                                                        in client else '#6a5'),
                           130 + 440 * value / most, y + 10, form % value))
            y += 14
        y += 8
    with open(path, 'w') as f:
        f.write('<svg xmlns="http://www.w3.org/2000/svg" width="660" height="%d" font-family="sans-serif" '
                'font-size="11"><rect width="660" height="%d" fill="#fff"/>\n%s\n</svg>\n' % (y, y, '\n'.join(out)))


def own_network():
    """As root: go on in a network namespace of our own, where devices harm nobody. Can there be a line?"""
    if os.getuid() != 0 or not os.path.exists('/dev/net/tun'):
        return False
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:   # CLONE_NEWNET
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:   # lo up
        fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 0x49))
    try:
        # No run is to profit from what the one before it has found out about the line.
        with open('/proc/sys/net/ipv4/tcp_no_metrics_save', 'w') as f:
            f.write('1')
    except OSError:
        return False
    return subprocess.run([os.path.join(BUILD, 'line'), '/dev/null', '1', '0', 'true']).returncode == 0


def build():
    os.makedirs(BUILD, exist_ok=True)
    cc = os.environ.get('CC', 'cc').split()
    for name, source, libs in (('line', 'bench_line.c', []), ('drain', 'drain.c', ['-lbearssl'])):
        servers.tool(*cc, '-std=c11', '-D_POSIX_C_SOURCE=200809L', '-D_DEFAULT_SOURCE', '-O2', '-o', os.path.join(BUILD, name),
                     os.path.join(TOP, 'test', source), *libs)


def other(name):
    """The program of that name, or one built from that revision."""
    if not name or os.access(name, os.X_OK):
        return name and os.path.abspath(name)
    folder = os.path.join(BUILD, 'revision')
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    servers.tool('sh', '-ec', 'git -C "$1" archive "$2" >"$3.tar"; tar -C "$3" -xf "$3.tar"; make -C "$3" imap_backup',
                 'sh', TOP, name, folder, env=dict(os.environ, ARGS='', MAKEFLAGS=''))
    return os.path.join(folder, 'imap_backup')


def many_mailboxes(bench):
    print('\n20,000 mailboxes without news: CPU s with LIST-STATUS, with a STATUS each (wanted: less than 1)')
    for name in ('imap_backup', 'the other'):
        if name in bench.clients:
            print('%-12s %s' % (name, '  '.join('%.2f' % found[0] if found else '-' for found in
                                                bench_growth.many_mailboxes(BUILD, bench.clients[name].path))))


def main():
    parser = argparse.ArgumentParser(description='measures imap_backup against the limit and against others')
    parser.add_argument('what', nargs='*', metavar='growth', help='the other table, or what of it begins so')
    parser.add_argument('--vs', metavar='PROGRAM|REVISION', help='another imap_backup to compare with')
    parser.add_argument('--limit', type=int, default=8, help='CPU seconds of a process in the other table (8)')
    parser.add_argument('--scale', type=float, default=1, help='size of the sets (1)')
    parser.add_argument('--rounds', type=int, default=3, help='runs of each, for the median (3)')
    parser.add_argument('--sets', default=','.join(SETS), help='of ' + ', '.join(SETS))
    parser.add_argument('--lines', default=','.join(LINES), help='of ' + ', '.join(LINES))
    parser.add_argument('--clients', help='only these')
    parser.add_argument('--peer', action='append', default=[], metavar='NAME=COMMAND')
    parser.add_argument('--disk', metavar='FOLDER', help='also write there, with fsync')
    parser.add_argument('--svg', help='the picture goes there')
    parser.add_argument('--json', help='all figures go there')
    options = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    build()
    options.vs = other(options.vs)
    if options.what[:1] == ['growth']:
        programs = {'imap_backup': os.path.join(TOP, 'imap_backup'), **({'the other': options.vs} if options.vs else {})}
        return bench_growth.growth(BUILD, programs, options.limit, options.scale, ' '.join(options.what[1:]))
    far = own_network()
    if not far:
        say('no long lines here (they take root, /dev/net/tun and network namespaces): loopback only')
    bench = Bench(options, far)
    try:
        bench.measure()
        bench.goals()
        if not options.clients:
            many_mailboxes(bench)
        if options.svg:
            picture(bench, options.svg)
        if options.json:
            with open(options.json, 'w') as f:
                json.dump([[*key, found] for key, found in bench.results.items()], f)
    finally:
        bench.close()


if __name__ == '__main__':
    main()
