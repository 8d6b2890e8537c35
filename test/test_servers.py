"""The same at each kind of server: `make test-servers`, or ARGS=cyrus. A test for each pair of SERVERS and CHECKS;
without SERVERS in the environment there is none."""
import collections
import os
import random
import re
import signal
import subprocess
import tempfile
import time

import archive
import sample
import servers
from run import PROGRAM, Skip

NAMES = ('Work', 'Work/Projects', 'Work/Projects/2024', 'Entwürfe', 'Größe & Maß', 'R&D', '&', '日本語/受信', '😀', "it's",
         'a "quoted" name', 'back\\slash', '100%', 'x*', '{5}', 'two  blanks', ' blank in front', '~tilde', 'a,b;c!d', 'INBOXES',
         'nil', '/'.join('deep%d' % i for i in range(15)), 'long ' + 'x' * 120)


class Place:
    """A user at one of the servers."""

    def __init__(self, t, kind):
        self.t, self.email, self.user = t, t.email, re.sub('[^a-z0-9]', '', t.user)
        self.server = getattr(self, kind)()
        t.user = self.user
        t.config(dict(t.account(mode='plain', server=self.server, host='127.0.0.1', ssl=False)), retries=2, timeout=60)

    def dovecot(self):
        return self.t.dovecot()

    def cyrus(self):
        return self.shared('cyrus', servers.Cyrus, 'usr/lib/cyrus/bin/imapd')

    def courier(self):
        return self.shared('courier', servers.Courier, 'usr/bin/imapd')

    def shared(self, name, make, program):
        if not servers.unpacked(name, program):
            raise Skip('no %s: test/setup.sh servers %s' % (name, name))
        if name not in self.t.shared:
            self.t.shared[name] = make(tempfile.mkdtemp(prefix=name + '-', dir=self.t.base()))
        return self.t.shared[name]

    # -- the mailboxes; names with / between the parts --

    def name(self, name):
        return name if name == 'INBOX' else self.server.prefix + name.replace('/', self.server.delimiter)

    def deliver(self, name, mails):
        imap = self.t.imap(self.server)
        took = sample.deliver(imap, self.name(name), mails)
        imap.logout()
        return len(took)

    def held(self):
        return self.t.held(self.server)

    def change(self, name, act):
        """act(imap) with the mailbox selected."""
        imap = self.t.imap(self.server)
        assert imap.select(sample.quoted(sample.mutf7(self.name(name))))[0] == 'OK'
        act(imap)
        imap.logout()

    def changes(self, one):
        """Is this a mail that the server does not give back as it was? Cyrus puts X for 8-bit octets in headers,
        Courier loses a CR within a line, and takes a date of 0 for none."""
        head = one.text.partition(b'\n\n')[0]
        return {'Cyrus': bool(re.search(rb'[\x80-\xff]', head)),
                'Courier': b'\r' in one.text or one.date == 'Thu Jan  1 00:00:00 1970'}.get(type(self.server).__name__, False)

    # -- runs --

    def backup(self, gone=None):
        """All is as the server has it; what was said."""
        got = self.t.backup()
        self.t.same(self.held(), gone=gone, delimiter=self.server.delimiter)
        return got.err

    def nothing(self, what):
        """A run that stores nothing, changes nothing and downloads no mail."""
        before = archive.digests(self.t.dest)
        got = self.t.backup('-vv')
        bodies = re.findall(r'UID FETCH [^\n]*BODY\.PEEK\[\]', got.err)
        assert ': 0 new, 0 gone, 0 back' in got.err and archive.digests(self.t.dest) == before and not bodies, \
            '%s: %s\n%s' % (what, bodies, got.err[-1200:])

    def lose_indexes(self):
        for base, _, files in os.walk(self.t.dest):
            for file in files:
                if file.endswith('.index'):
                    os.unlink(os.path.join(base, file))


def ordinary(n, label='m'):
    rng = random.Random(label)
    return [sample.mail(rng, '%s %d' % (label, i), message_id=i % 6 != 4) for i in range(n)]


# ---- what is done at each ----

def first_backup_and_no_news(p):
    for name, n in (('INBOX', 120), ('Work', 7), ('Work/Projects', 1), ('Empty', 0)):
        p.deliver(name, ordinary(n, name))
    p.backup()
    p.nothing('no news')
    p.nothing('no news again')


def changes(p):
    p.deliver('INBOX', ordinary(40))
    p.deliver('Work', ordinary(5, 'w'))
    p.backup()
    was = p.held()

    def act(imap):
        imap.uid('STORE', '2:4', '+FLAGS', '(\\Seen \\Flagged)')
        imap.uid('STORE', '5:6', '-FLAGS', '(\\Seen \\Answered)')
        imap.uid('STORE', '9,17,40', '+FLAGS', '(\\Deleted)')
        imap.expunge()
    p.change('INBOX', act)
    p.deliver('INBOX', ordinary(8, 'new'))
    p.deliver('New/Below', ordinary(3, 'below'))
    left = [m.uid for m in p.held()['INBOX']]
    gone = {'INBOX': [m for m in was['INBOX'] if m.uid not in left]}
    assert len(gone['INBOX']) >= 3   # some bore \\Deleted already
    said = p.backup(gone)
    assert '11 new, %d gone' % len(gone['INBOX']) in said, said
    p.nothing('after changes')
    for m in gone['INBOX'][:1]:
        p.deliver('INBOX', [sample.Mail(m.data, '', m.when)])
    p.backup({'INBOX': gone['INBOX'][1:]})
    p.lose_indexes()
    p.nothing('the index lost after changes')


def odd_names(p):
    refused = [name for name in NAMES if not p.deliver(name, ordinary(2, name))]
    print('refused:', refused)
    assert len(refused) < len(NAMES) // 3, refused
    p.backup()
    p.nothing('no news')
    p.lose_indexes()
    p.nothing('the index lost')


def odd_mails(p):
    mails = [m for _, m in sample.awkward()] + [sample.Mail(m, '', sample.T0 + i)
                                                for i, m in enumerate(sample.forged(random.Random(2)))]
    took = p.deliver('INBOX', mails)
    p.deliver('Reversed', mails[::-1])
    print('took %d of %d' % (took, len(mails)))
    assert took > len(mails) // 3
    p.backup()
    p.nothing('no news')


def odd_mails_without_index(p):
    for name, one in (('A', 0), ('B', 1), ('C', 2)):
        p.deliver(name, [m for _, m in sample.awkward()][one::3])
    p.backup()
    p.lose_indexes()
    p.nothing('the index lost')
    p.nothing('no news after that')


def killed(p):
    """Anywhere, often: nothing is lost, nothing comes twice."""
    rng = random.Random(p.user)
    for name in 'INBOX', 'Work', 'Sent':
        p.deliver(name, [sample.with_attachment(rng, '%s %d' % (name, i), 30_000) if i % 5 == 0 else
                         sample.mail(rng, '%s %d' % (name, i)) for i in range(150)])
    ended = 0
    for n in range(24):
        process = subprocess.Popen([PROGRAM, '-q', p.t.path], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        time.sleep(rng.random() * 0.01 * (n + 1))
        os.killpg(process.pid, signal.SIGKILL)
        ended += process.wait() == -signal.SIGKILL
    assert ended, 'it was never killed'
    p.backup()
    p.nothing('after the kills')


def list_and_check(p):
    p.deliver('INBOX', ordinary(3))
    p.deliver('Entwürfe/Größe & Maß', ordinary(2))
    got = p.t.run('--list')
    assert got.status == 0 and 'INBOX' in got.out and 'Größe & Maß' in got.out, got
    got = p.t.run('--check')
    assert got.status == 0, got
    assert not os.path.exists(p.t.archive())
    p.t.config(dict(p.t.account(mode='plain', server=p.server, host='127.0.0.1', ssl=False), password='wrong'), retries=0)
    got = p.t.run('--check')
    assert got.status == 1 and 'wrong' not in got.err + got.out, got


def uidvalidity(p):
    """The mailbox is made anew, with the same mails and one more."""
    mails = ordinary(30)
    p.deliver('Work', mails)
    p.backup()
    imap = p.t.imap(p.server)
    assert imap.delete(sample.quoted(p.name('Work')))[0] == 'OK'
    imap.logout()
    time.sleep(1.1)   # many make it of the time
    p.deliver('Work', mails + ordinary(1, 'more'))
    said = p.backup()
    assert ': 1 new, 0 gone' in said, said
    p.nothing('no news')


def restored(p):
    """From a Dovecot to here: what is backed up here then is what was there; a second restore sends nothing."""
    t, source = p.t, p.t.dovecot()
    boxes = sample.boxes(mails=200)
    boxes['R&D/Great'] = ordinary(30, 'r')   # some without a Message-ID
    here = dict(t.account(mode='plain', server=p.server, host='127.0.0.1', ssl=False))
    imap = archive.login('127.0.0.1', source.port, p.user + 'a', servers.PASSWORD)
    for name, mails in boxes.items():
        sample.deliver(imap, name, mails)
    imap.logout()
    t.config(dict(t.account(mode='plain', server=source, host='127.0.0.1', ssl=False), username=p.user + 'a'))
    t.backup()
    t.config(here)
    got = t.run('--restore', '--yes', timeout=300)
    names = re.findall(r': ([^:]*): creating the mailbox', got.err)   # Cyrus takes no quotes in a name
    assert got.status == (1 if names else 0) and len(names) <= 1 and not re.search(': at [0-9]', got.err), got.err
    again = t.run('--restore', '--yes', timeout=300)
    dest = t.dest + '2'
    t.config(here, destination=dest)
    t.backup()
    mails, twice = 0, 0
    for file in sorted(os.listdir(t.archive())):
        if file.endswith('.mbox') and not (names and 'quoted' in file):
            name = file.replace('%2E', '_') if p.server.delimiter == '.' else file
            at = os.path.join(dest, t.email, ('' if file == 'INBOX.mbox' else p.server.prefix) + name)
            there = collections.Counter(archive.read(at))
            for one in archive.read(os.path.join(t.archive(), file)):
                mails += 1
                there[one] -= 1
                assert there[one] >= 0 or p.changes(one), (file, one)
                # changed, it has another ID, or another made one
                twice += p.changes(one) and bool(re.search(
                    rb'(?mi)^Message-ID:[^\n]*(imap_backup\.py\.local|[\x80-\xff])', one.text))
    assert mails > 200
    assert sum(map(int, re.findall(r'(\d+) mails put back, \d+ were there', again.err))) == twice, (twice, again.err)


CHECKS = (first_backup_and_no_news, changes, odd_names, odd_mails, odd_mails_without_index, killed, list_and_check,
          uidvalidity, restored)


def pair(kind, check):
    def test(t):
        check(Place(t, kind))
    return test


for kind in os.environ.get('SERVERS', '').split():
    for check in CHECKS:
        globals()['test_at_%s_%s' % (kind, check.__name__)] = pair(kind, check)
