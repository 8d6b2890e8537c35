"""What grows with the number of mails, names and mailboxes, and how fast: CPU seconds and peak memory of
the program with its children, at n, 2n and 4n. `make bench ARGS=growth`: bench.py calls this."""
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import imapd
import sample

class Plain(imapd.Session):
    capabilities = imapd.FULL.replace(' CONDSTORE', '').replace(' STATUS=SIZE', '')


class NoList(Plain):
    capabilities = Plain.capabilities.replace(' LIST-STATUS', '')


class Reverse(Plain):
    """The last mail comes first, and SEARCH tells single UIDs."""

    def fetch(self, args):
        kept = []
        self.fetch_mail = lambda *mail: kept.append(mail)
        imapd.Session.fetch(self, args)
        del self.fetch_mail
        for mail in reversed(kept):
            self.fetch_mail(*mail)

    def search_line(self, tag, uids, extended):
        imapd.Session.search_line(self, tag, uids[::-1], False)


def two_keys():
    """Subjects of two mails without a Message-ID whose keys begin with the same octet."""
    seen = {}
    for i in range(1 << 20):
        first = hashlib.sha1(b'Subject: %d' % i).digest()[0]
        if first in seen:
            return seen[first], i
        seen[first] = i


def meeting(n, found=[]):
    """Message-IDs whose hashes are near each other: 8 bits agree, which a table that is laid out by them feels."""
    i = found[-1] + 1 if found else 0
    while len(found) < n:
        if hashlib.sha256(b'<%d@x>' % i).digest()[0] == 0:
            found.append(i)
        i += 1
    return (b'<%d@x>' % i for i in found)


def mails(kind, n):
    keys, ids = two_keys(), meeting(n if kind == 'meeting' else 0)
    for i in range(n):
        yield {'ordinary': lambda: b'Message-ID: <%d@x>\r\nDate: %d\r\n\r\nb\r\n' % (i, i),
               'copies': lambda: b'Message-ID: <same@x>\r\nDate: %d\r\n\r\nb %d\r\n' % (i, i),
               'none': lambda: b'Subject: s\r\n\r\nb %d\r\n' % i,
               'two': lambda: b'Subject: %d\r\n\r\nb %d\r\n' % (keys[i % 2], i),
               'meeting': lambda: b'Message-ID: %s\r\n\r\nb\r\n' % next(ids)}[kind]()


def mailbox(kind, step=1):
    def make(n):
        box = imapd.Mailbox()
        for data in mails(kind, n):
            box.add(data, uid=box.uidnext + step - 1)
        return {'INBOX': box}
    return make


def mailboxes(form, held=0):
    def make(n):
        return {'INBOX' if k == 0 else form % k: imapd.Mailbox(sample.many(held, k)) for k in range(n)}
    return make


def flagged(case):
    for m in case.box.mails:
        m.flags ^= {'\\Flagged'}
    case.box.add(b'Message-ID: <news%d@x>\r\n\r\nb\r\n' % case.box.uidnext)


def renumbered(case):
    case.box.renumber()


def half_gone(case):
    case.box.mails = case.box.mails[::2]
    case.box.add(b'Message-ID: <news%d@x>\r\n\r\nb\r\n' % case.box.uidnext)


def unindexed(case):
    for base, _, names in os.walk(os.path.join(case.folder, 'archive')):
        for name in names:
            if name.endswith('.index'):
                os.unlink(os.path.join(base, name))


def nothing(case):
    pass


FIRST, LOST, NEW = ('first backup', nothing), ('index lost', unindexed), ('UIDVALIDITY new', renumbered)
FLAGS, GONE, NONE = ('all flags changed', flagged), ('half of them gone', half_gone), ('no news', nothing)
MANY = ('mailboxes of one mail', 5000, mailboxes('Folder number %06d', 1), Plain, {}, [], [FIRST, NONE, LOST])
EMPTY = ('empty mailboxes', 5000, mailboxes('Folder number %06d'), Plain, {}, [], [FIRST, NONE])
EACH = ('the same, a STATUS each', 5000, mailboxes('Folder number %06d'), NoList, {}, [], [FIRST, NONE])
# What, n, mailboxes, oddities of the server, keys of the configuration, options, steps.
CASES = (
    ('mails', 10000, mailbox('ordinary'), Plain, {}, [], [FIRST, LOST, NEW, FLAGS, GONE]),
    ('mails, the last first', 10000, mailbox('ordinary', 2), Reverse, dict(email_batch_size=100000), [], [FIRST, LOST]),
    ('copies of one mail', 10000, mailbox('copies'), Plain, {}, [], [FIRST, LOST, NEW, FLAGS, GONE]),
    ('copies, kept', 10000, mailbox('copies'), Plain, dict(keep_duplicates=True), [], [FIRST, LOST, NEW, FLAGS, GONE]),
    ('mails without Message-ID', 10000, mailbox('none'), Plain, {}, [], [FIRST, LOST, NEW, GONE]),
    ('such mails, the last first', 10000, mailbox('none', 2), Reverse, {}, [], [FIRST, LOST]),
    ('such mails, two keys in turn', 10000, mailbox('two'), Plain, {}, [], [FIRST, LOST, NEW]),
    ('IDs that meet in a table', 10000, mailbox('meeting'), Plain, {}, [], [FIRST, LOST, NEW]),
    MANY, EMPTY, EACH,
    ('names of 900 octets', 800, mailboxes('%06d' + 'x' * 894), Plain, {}, ['-n'], [('dry run', nothing)]),
)


class Case:
    """A server with n of something, and a folder for an archive."""

    def __init__(self, bench, program, case, n):
        _, _, make, odd, self.keys, self.options, _ = case
        self.line, self.program = os.path.join(bench, 'line'), program
        self.folder = os.path.join('/dev/shm', 'imap_backup.growth.%d' % os.getpid())
        boxes = make(n)
        self.box, self.server = boxes.get('INBOX'), imapd.Server(boxes, session=odd)
        os.mkdir(self.folder, 0o700)

    def close(self):
        self.server.stop()
        shutil.rmtree(self.folder)

    def run(self, limit):
        """(CPU seconds, KiB), or None if a process needs more seconds of CPU than that, or it fails."""
        config, figures = (os.path.join(self.folder, name) for name in ('config.json', 'figures'))
        with open(config, 'w') as f:
            json.dump(dict({'destination': os.path.join(self.folder, 'archive'), 'timeout': 600, 'accounts': [
                {'email': 'u', 'host': '127.0.0.1', 'port': self.server.port, 'ssl': False, 'password': 'secret'}],
                'retries': 0, 'processes_per_account': 1}, **self.keys), f)
        os.chmod(config, 0o600)
        process = subprocess.Popen([self.line, figures, '0', '0', self.program, '-q', *self.options, config],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=True, preexec_fn=lambda: resource.setrlimit(
                                       resource.RLIMIT_CPU, (limit, limit)))
        try:   # it waits for the server, too
            said = process.communicate(timeout=10 * limit)[0].decode(errors='replace')
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
        with open(figures) as f:
            got = json.load(f)
        if got['status'] and got['user'] + got['system'] >= limit:
            return None
        if got['status'] or self.server.faults:   # a limit that is told, perhaps
            print('exit status %d: %s %s' % (got['status'], said[-500:].strip(), self.server.faults[:3]), file=sys.stderr)
            return None
        return got['user'] + got['system'], got['rss']


def grow(bench, program, case, limit, scale, sizes=(1, 2, 4)):
    """{step: [figures at each size]}; where one took too long, the larger ones are not tried."""
    found = {name: [] for name, _ in case[6]}
    for size in sizes:
        c = Case(bench, program, case, max(1, int(case[1] * scale)) * size)
        try:
            for name, act in case[6]:
                if found[name][-1:] == [None]:
                    found[name].append(None)
                    break
                act(c)
                found[name].append(c.run(limit))
                if found[name][-1] is None:
                    break
        finally:
            c.close()
    return found


def show(figures, which, form):
    """Three figures, and by what the last doubling has multiplied them."""
    values = [None if f is None else f[which] for f in figures]
    text = [('%8s' % '-' if v is None else form % v) for v in values] + ['%8s' % ''] * (3 - len(values))
    times = values[2] / values[1] if len(values) == 3 and None not in values[1:] and values[1] else None
    return ' '.join(text) + ('%6s' % '-' if times is None else '%6.2f' % times)


def growth(bench, programs, limit=10, scale=1.0, pattern=''):
    print('%-58s %26s%6s %26s%6s' % ('', 'CPU s at n, 2n, 4n', 'x', 'peak KiB', 'x'))
    for case in CASES:
        if not case[0].startswith(pattern):
            continue
        for label, program in programs.items():
            for step, figures in grow(bench, program, case, limit, scale).items():
                name = '%d %s, %s%s' % (case[1] * scale, case[0], step, ' (%s)' % label if len(programs) > 1 else '')
                print('%-58s %s %s' % (name, show(figures, 0, '%8.3f'), show(figures, 1, '%8.0f')))
                sys.stdout.flush()


def many_mailboxes(bench, program, limit=100, n=20000):
    """CPU seconds of a run without news in so many mailboxes: told with LIST-STATUS, and with a STATUS each."""
    return [(grow(bench, program, case, limit, n / case[1], (1,))['no news'] or [None])[0] for case in (EMPTY, EACH)]
