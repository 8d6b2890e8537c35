"""What comes back out of an archive: verify, export, restore."""
import collections
import imaplib
import json
import mailbox
import os
import pty
import random
import re
import signal
import subprocess
import threading
import time

import archive
import imapd
import sample
import servers
from run import children
from test_backup import delete, few, fill
from test_odd import fields_as_asked


def raw(t, *args):
    done = subprocess.run([*t.program, *args, t.path], stdout=subprocess.PIPE, cwd=t.folder, timeout=60)
    assert done.returncode == 0, done.returncode
    return done.stdout


def own_ids(data):
    return re.findall(rb'(?mi)^Message-ID:\s*(<\S+>)', data.partition(b'\r\n\r\n')[0] + b'\r\n')


def test_verify_finds_damage(t):
    """A flipped octet anywhere in a mail, a torn and a foreign tail, an index that is lost."""
    fill(t, {'INBOX': few(6)})
    t.config()
    t.backup()
    got = t.backup('--verify')
    assert re.search(r' INBOX: 6 mails, 0 gone, .*, 0 damaged', got.out), got.out
    path = t.mbox('INBOX')
    with open(path, 'rb') as f:
        whole = f.read()
    before = archive.digests(t.dest)
    for at in [0, 3, 20, 34, 45, 50, 72, whole.index(b'\n\nFrom ') + 1, len(whole) // 2, len(whole) - 3]:
        with open(path, 'wb') as f:   # at 34 is the time's last digit of the minutes: of another minute, then
            f.write(whole[:at] + bytes([whole[at] ^ (1 if at == 34 else 0x10)]) + whole[at + 1:])
        got = t.backup('--verify', status=1)
        assert ', 1 damaged' in got.out and 'damaged: at ' in got.err, (at, got)
    with open(path, 'wb') as f:
        f.write(whole[:-40])
    got = t.backup('--verify', status=1)
    assert ', 1 damaged' in got.out and 'cut off' in got.err, got
    with open(path, 'wb') as f:
        f.write(whole + b'From me Thu Jan  1 00:00:00 1970\nSubject: x\n\nhello\n\n')
    got = t.backup('--verify')
    assert ' 7 mails' in got.out and '1 mails stand in no index' in got.err, got
    with open(path, 'wb') as f:
        f.write(whole)
    os.rename(path + '.index', path + '.kept')
    got = t.backup('--verify')
    assert ' 6 mails' in got.out and 'index is missing' in got.err, got
    os.rename(path + '.kept', path + '.index')
    assert archive.digests(t.dest) == before   # it mends nothing


def test_export_one(t):
    held = fill(t, {'INBOX': few(3), 'Sent': few(2, 's') + few(1)})
    t.config()
    t.backup()
    for name, mails in held.items():
        for mail in mails:
            wanted = own_ids(mail.data)
            if len(wanted) != 1:
                continue
            for text in (wanted[0].decode(), wanted[0].decode()[1:-1]):
                got = raw(t, '--export', text)
                want = mail.data.replace(b'\r\n', b'\n')
                assert got == want + (b'' if want.endswith(b'\n') else b'\n'), (name, mail.uid)
    got = t.backup('--export', '<nobody@nowhere>', status=1)
    assert 'not found' in got.err and got.out == ''


def scripted(t, boxes, **more):
    """A server with these mailboxes that the config names; for a with statement."""
    server = imapd.Server(boxes, **more)
    t.config({'email': t.email, 'username': 'me', 'password': 'secret', 'host': '127.0.0.1', 'port': server.port,
              'ssl': False})
    return server


def test_export_odd_ids(t):
    """Without brackets, with a comment behind them, made ones of mails that differ by their bodies only."""
    mails = {'bare@x': b'Message-ID: bare@x\r\n', '<a b@x> (why)': b'Message-ID: <a\r\n b@x> (why)\r\n',
             '<1@x>': b'Message-ID: <1@x>\r\nMessage-ID: <2@x>\r\n',
             'da39a3ee5e6b4b0d3255bfef95601890afd80709@imap_backup.py.local': b'Message-ID: \r\n',
             '<da39a3ee5e6b4b0d3255bfef95601890afd80709.2@imap_backup.py.local>': b'To-Do: nothing\r\n'}
    data = [header + b'\r\nbody %d\r\n' % i for i, header in enumerate(mails.values())]
    with scripted(t, {'INBOX': imapd.Mailbox(data)}):
        t.backup()
    for name, whole in zip(mails, data):
        assert raw(t, '--export', name) == whole.replace(b'\r\n', b'\n'), name
    for name in '', '<>', '<2@x>', 'a b@x':
        t.backup('--export', name, status=1)


def test_nothing_matches(t):
    """A -m that no archive's mailbox matches is a failure, and not an empty success."""
    fill(t, {'INBOX': few(2)})
    t.config()
    t.backup()
    for mode in ['--verify'], ['--export-all'], ['--restore', '-n']:
        assert 'no archive matches -m' in t.backup(*mode, '-m', 'Inbux', status=1).err, mode
        t.backup(*mode, '-m', 'Inbux', '-m', 'inbox')


def test_export_all(t):
    """Python's mailbox sees as many mails as were stored; what is gone bears no mark."""
    fill(t, sample.boxes(mails=60))
    t.config()
    t.backup()
    delete(t.imap(), '1:2')
    t.backup()
    stored = sum(len(archive.read(os.path.join(t.archive(), f))) for f in os.listdir(t.archive())
                 if f.endswith('.mbox'))
    with open('/dev/full', 'wb') as full:
        assert subprocess.run([*t.program, '--export-all', t.path], stdout=full).returncode == 1
    for options, count in (((), stored), (('--gone',), 2)):
        got = raw(t, '--export-all', *options)
        path = os.path.join(t.folder, 'all.mbox')
        with open(path, 'wb') as f:
            f.write(got)
        mails = archive.read(path)
        assert len(mails) == len(mailbox.mbox(path)) == count, (len(mails), count)
        assert not any(m.state & archive.GONE for m in mails)


def there(t, user):
    """What another user of the Dovecot holds."""
    imap = archive.login('127.0.0.1', t.dovecot().port, user, servers.PASSWORD)
    held = archive.fetch_all(imap)
    imap.logout()
    return held


def count(t, user, name='INBOX'):
    """How many mails another user has there; asked for in passing."""
    try:
        imap = archive.login('127.0.0.1', t.dovecot().port, user, servers.PASSWORD)
        kind, said = imap.status(name, '(MESSAGES)')
        imap.logout()
    except (imaplib.IMAP4.abort, OSError):   # Dovecot's login process can die with a client that is killed
        return -2
    return int(re.search(rb'MESSAGES (\d+)', said[0]).group(1)) if kind == 'OK' else 0


def settled(t, user, name='INBOX'):
    """Wait until the server has stored what it had received of a restore that was killed."""
    before = -1
    while before < 0 or before != count(t, user, name):
        before = count(t, user, name)
        time.sleep(0.3)


def alike(mails):
    """What is to be the same on both sides, in any order."""
    return sorted((m.data if m.data.endswith(b'\r\n') else m.data + b'\r\n', m.state, m.when)
                  for m in mails)


def unique(mails):
    """Without second copies of a Message-ID, which a backup leaves out."""
    seen, out = set(), []
    for mail in mails:
        key = archive.own_id(mail.data)
        if key == b'' or key not in seen:
            out.append(mail)
        seen.add(key)
    return out


def test_restore_round_trip(t):
    """Octets, flags and dates of varied mails are the same at another user; a second run sends nothing."""
    held = fill(t, sample.boxes(mails=120))
    t.config()
    t.backup()
    got = t.backup('--verify', '--online')
    assert len(re.findall('0 have gone; [1-9].* compared .*, 0 damaged', got.err)) == sum(1 for m in held.values() if m), got.err
    other = t.user + 'b'
    t.config(t.account(username=other))
    got = t.backup('--restore', status=1)
    assert '--yes' in got.err, got.err
    said = json.loads(t.backup('--restore', '-n', '--json').out)
    assert said['mode'] == 'restore' and said['dry_run'] and said['accounts'][0]['new'] == 0, said
    have = {sample.mutf7(b['name']): b['new'] for b in said['accounts'][0]['boxes']}
    assert have == {k: len(unique(v)) for k, v in held.items()}, have
    before = archive.digests(t.dest)
    got = t.backup('--restore', '-n')
    assert 'would be put back' in got.err and set(there(t, other)) <= {'INBOX'}, got.err
    got = t.backup('--restore', '--yes')
    now = there(t, other)
    for name, mails in held.items():
        want, have = (collections.Counter(alike(m)) for m in (unique(mails), now.get(name, [])))
        assert want == have, (name, want - have, have - want)
    got = t.backup('--restore', '--yes', '--json')
    assert not re.search(r'[1-9]\d* mails put back', got.err), got.err
    for box in json.loads(got.out)['accounts'][0]['boxes']:
        assert box['to'] == box['name'] and box['new'] == box['octets'] == box['left_out'] == box['failures'] == 0, box
        assert box['present'] == len(unique(held[sample.mutf7(box['name'])])), box
    assert {k: len(v) for k, v in now.items()} == {k: len(v) for k, v in there(t, other).items()}
    assert archive.digests(t.dest) == before


def test_restore_goes_on(t):
    """Killed in the middle and run again: nothing twice, nothing missing. Into a mailbox of its own."""
    held = fill(t, {'INBOX': few(400)})
    t.config()
    t.backup()
    other = t.user + 'b'
    t.config(t.account(username=other))
    running = subprocess.Popen([*t.program, '--restore', '--yes', '--into', 'Old/\xfcber', t.path],
                               stderr=subprocess.PIPE)
    name = 'Old/&APw-ber/INBOX'
    for _ in range(1000):
        if count(t, other, name) > 10:
            break
    running.terminate()
    running.stderr.read()
    running.wait()
    settled(t, other, name)
    t.backup('--restore', '--yes', '--into', 'Old/\xfcber')
    assert alike(there(t, other)[name]) == alike(held['INBOX'])


def test_restore_leaves_out_what_is_gone(t):
    held = fill(t, {'INBOX': few(5)})
    t.config()
    t.backup()
    delete(t.imap(), '2,4')
    t.backup()
    other = t.user + 'b'
    t.config(t.account(username=other))
    got = t.backup('--restore', '--yes')
    assert '3 mails put back, 0 were there, 2 that are marked gone' in got.err, got.err
    t.backup('--restore', '--yes', '--include-gone')
    assert alike(there(t, other)['INBOX']) == alike(held['INBOX'])


def test_restore_include_gone_of_one_id(t):
    """A draft and what it was before it was edited: the one that is there is not sent again, the other one is."""
    drafts = [b'Message-ID: <d@x>\r\n\r\n' + b'words ' * n + b'\r\n' for n in (1, 2)]
    box = imapd.Mailbox(drafts[:1])
    with scripted(t, {'INBOX': box}):
        t.backup()
        box.expunge(1)
        box.add(drafts[1])
        t.backup()
    boxes = {'INBOX': imapd.Mailbox(drafts[1:])}
    for again in 0, 1:
        got, lines = restore_to(t, boxes, options=('--include-gone',))
        assert [m.data for m in boxes['INBOX'].mails] == [drafts[1], drafts[0]], boxes['INBOX'].mails
        assert '%d mails put back, %d were there' % (1 - again, 1 + again) in got.err, got.err


class Target(imapd.Session):
    """A server to restore to. refuse: {word of a mail: answer}; the tenth BAD ends the session."""
    capabilities = imapd.FULL + ' NAMESPACE'
    refuse = {}
    bads = 0

    def cmd_SELECT(self, tag, args):
        self.cmd_EXAMINE(tag, args)

    def cmd_UNSELECT(self, tag, args):
        self.box = None
        self.ok(tag)

    def cmd_FETCH(self, tag, args):
        self.cmd_UID_FETCH(tag, args)   # nothing is expunged here: UIDs are numbers

    def cmd_CREATE(self, tag, args):
        name = imapd.tokens(args)[0]
        if not name.startswith(self.prefix):
            return self.no(tag, 'everything must be below ' + self.prefix)
        self.boxes[name] = imapd.Mailbox(delimiter=self.delimiter)
        self.ok(tag)

    def cmd_SUBSCRIBE(self, tag, args):
        self.ok(tag)

    def cmd_APPEND(self, tag, args):
        name, flags, when, size, data = re.match(
            r'(?s)("[^"]*"|\S+) \((.*?)\) "(\d\d-.*?)" \{(\d+)\+?\}\r\n(.*)', args).groups()
        data = (data.encode('utf-8', 'surrogateescape') + b'\r\n' * 9)[:int(size)]   # they were stripped
        for word, answer in self.refuse.items():
            if word in data:
                if answer is None:
                    return self.drop('rst')
                self.bads += answer.startswith('BAD')
                return self.bye() if self.bads == 10 else self.line(tag + ' ' + answer)
        self.boxes[self.find(name.strip('"'))].add(data, flags, archive.epoch(when))
        self.ok(tag)


def restore_to(t, boxes, status=0, options=(), base=Target, hook=None, **odd):
    with imapd.Server(boxes, session=type('Odd', (base,), odd), hook=hook) as server:
        server.gone = []
        t.config({'email': t.email, 'username': 'me', 'password': 'secret', 'host': '127.0.0.1',
                  'port': server.port, 'ssl': False})
        got = t.backup('--restore', '--yes', *options, status=status)
        faults = [f for f in server.faults if not re.match(
            'a backup must not say: (SELECT|FETCH|CREATE|SUBSCRIBE|APPEND) ', f)]
        assert not faults, faults
        return got, [c.text for c in server.commands]


def test_restore_refusals(t):
    """Refused mails are told and cost nothing but themselves: NO, BAD by the dozen, and a line that breaks."""
    mails = few(60)
    words = [archive.own_id(m.data) for m in mails]
    held = fill(t, {'INBOX': mails})['INBOX']
    t.config()
    t.backup()
    refuse = {words[3]: 'NO no', words[7]: None, **{w: 'BAD Command Argument Error. 11' for w in words[20:45]}}
    boxes = {'INBOX': imapd.Mailbox()}
    got, lines = restore_to(t, boxes, status=1, refuse=refuse)
    want = [m for m, w in zip(held, words) if w not in refuse]
    assert sorted(m.data for m in boxes['INBOX'].mails) == sorted(m.data for m in want), got.err
    assert got.err.count('Argument Error. 11') == 25 and 'the line breaks at this mail' in got.err, got.err
    told = re.search(r'(\d+) mails put back, (\d+) were there', got.err)   # as nobody saw them answered
    assert int(told.group(1)) + int(told.group(2)) == len(want), got.err
    got, lines = restore_to(t, boxes, status=1, refuse={words[3]: 'NO [OVERQUOTA] full'})
    assert 'no room left' in got.err, got.err
    restore_to(t, boxes)
    assert sorted(m.data for m in boxes['INBOX'].mails) == sorted(m.data for m in held)
    got, lines = restore_to(t, {}, status=1, cmd_CREATE=lambda self, tag, args: self.no(tag, '[OVERQUOTA] full'))
    assert 'no room left for this account: full' in got.err and 'trying again' not in got.err, got.err
    boxes = {}   # a server that lists nothing, as Cyrus does before an INBOX is made
    restore_to(t, boxes)
    assert sorted(m.data for m in boxes['INBOX'].mails) == sorted(m.data for m in held)


def test_restore_goes_past_what_keeps_failing(t):
    """A mailbox at which the line breaks, or a mail that always is to be sent later: the others are put back."""
    mails = few(12)
    fill(t, {'A': few(2, 'a'), 'INBOX': mails, 'New': few(3, 'n')})
    t.config()
    t.backup()

    def select(self, tag, args):
        return self.drop('rst') if 'INBOX' in args else Target.cmd_SELECT(self, tag, args)
    for odd, there in ((dict(cmd_SELECT=select), 0), (dict(refuse={archive.own_id(mails[5].data): 'NO [SERVERBUG] no'}), 11)):
        boxes = {'INBOX': imapd.Mailbox()}
        got, lines = restore_to(t, boxes, status=1, **odd)
        assert {n: len(b.mails) for n, b in boxes.items()} == {'A': 2, 'INBOX': there, 'New': 3}, (odd, got.err)
        assert got.err.count('error: ') == 1, got.err


def test_restore_to_a_mailbox_that_is_not_listed(t):
    """CREATE is refused, as it is there, and the line breaks before it is open: that is tried again."""
    fill(t, {'INBOX': few(2), 'Zed': few(3, 'z')})
    t.config()
    t.backup()
    broke = []

    def listed(what):
        return lambda self, name, *more: name == 'Zed' or what(self, name, *more)

    def select(self, tag, args):
        if 'Zed' in args and not broke:
            broke.append(tag)
            self.drop('rst')
        Target.cmd_SELECT(self, tag, args)
    boxes = {'INBOX': imapd.Mailbox(), 'Zed': imapd.Mailbox()}
    got, lines = restore_to(t, boxes, list_line=listed(Target.list_line), status_line=listed(Target.status_line),
                            cmd_CREATE=lambda self, tag, args: self.no(tag, 'it is there'), cmd_SELECT=select)
    assert broke and {n: len(b.mails) for n, b in boxes.items()} == {'INBOX': 2, 'Zed': 3}, got.err


def test_restore_goes_on_after_a_long_pause(t):
    """A server that wants more than ten seconds gets them; nothing is sent, or told, a second time."""
    mails = few(4)
    fill(t, {'INBOX': mails, 'New': few(3, 'n')})
    t.config()
    t.backup()
    asked = []

    def select(self, tag, args):
        if 'New' in args and not asked:
            return asked.append(args) or self.no(tag, 'Request is throttled. Suggested Backoff Time: 10000 milliseconds')
        Target.cmd_SELECT(self, tag, args)
    boxes = {'INBOX': imapd.Mailbox()}
    got, lines = restore_to(t, boxes, status=1, cmd_SELECT=select, refuse={archive.own_id(mails[1].data): 'NO no'})
    assert {n: len(b.mails) for n, b in boxes.items()} == {'INBOX': 3, 'New': 3} and asked, got.err
    assert got.err.count('error: ') == 1 and sum('SELECT "INBOX"' in line for line in lines) == 1, (got.err, lines)


def test_restore_of_an_empty_mail(t):
    """As a full disk leaves it in a maildir; Dovecot takes no mail of zero octets, but one of a line end."""
    with scripted(t, {'INBOX': imapd.Mailbox([b'', b'Subject: s'])}):
        t.backup()
    t.config()
    for _ in range(2):
        t.backup('--restore', '--yes')
        assert sorted(m.data for m in there(t, t.user)['INBOX']) == [b'\r\n', b'Subject: s\r\n']


def test_restore_where_the_listing_is_refused(t):
    """What the target has is not known then: nothing is put there twice. One that asks to wait gets its time."""
    mails = few(30) + [sample.Mail(b'Subject: none %d\r\n\r\nno ID\r\n' % i, '', sample.T0) for i in range(30)]
    fill(t, {'INBOX': mails, 'Other': few(2, 'o')})
    t.config()
    t.backup()
    boxes = {'INBOX': imapd.Mailbox(), 'Other': imapd.Mailbox()}
    restore_to(t, boxes)
    for answer in 'NO no', 'BAD no', 'NO Server Unavailable. 15', 'OK [MESSAGELIMIT 10 20] more':
        refused = []

        def hook(session, tag, name, args):
            if name != 'FETCH' or not session.box or len(session.box.mails) < 60 or refused:
                return None
            refused.append(args)
            return session.line(tag + ' ' + answer) or True
        waits = 'Unavailable' in answer
        boxes['Other'].mails.clear()
        got, _ = restore_to(t, boxes, status=0 if waits else 1, hook=hook)
        assert refused and len(boxes['INBOX'].mails) == 60, (answer, len(boxes['INBOX'].mails), got.err)
        assert len(boxes['Other'].mails) == 2 and answer.split()[-1] in got.err, (answer, got.err)


def test_restore_to_a_mailbox_that_is_selected(t):
    """GNU's imap4d says OK to what is appended to the mailbox that is open, and drops it; and it names header fields
    as they were asked for. All comes there, and once. Where UNSELECT is refused or not offered, that costs nothing."""
    def append(self, tag, args):
        name = self.find(imapd.tokens(args)[0])
        self.ok(tag) if self.box is self.boxes[name] else Target.cmd_APPEND(self, tag, args)

    def fetch_body(self, m, item):
        fields = re.match(r'BODY\.PEEK\[HEADER\.FIELDS \((.*)\)\]$', item).group(1)
        return self.body(b'BODY[HEADER.FIELDS (%s)]' % fields.encode(), fields_as_asked(m.data, fields))

    def refused(self, tag, args):
        self.line(tag + ' BAD no')
    mails = few(20) + [sample.mail(random.Random(i), 'none %d' % i, message_id=False) for i in range(5)]
    held = fill(t, {'INBOX': mails, 'New': few(3, 'n')})
    t.config()
    t.backup()
    bare = Target.capabilities.replace('UNSELECT', '')
    for odd in (dict(cmd_APPEND=append, fetch_body=fetch_body), dict(cmd_UNSELECT=refused),
                dict(cmd_UNSELECT=refused, capabilities=bare)):
        boxes = {'INBOX': imapd.Mailbox()}
        for once in range(2):
            got, lines = restore_to(t, boxes, **odd)
            assert {n: sorted(m.data for m in b.mails) for n, b in boxes.items()} == \
                {n: sorted(m.data for m in mails) for n, mails in held.items()}, (odd, once, got.err)
            assert ('UNSELECT' in lines) == ('capabilities' not in odd), lines


def test_restore_whose_worker_dies_waits(t):
    """What it has sent may still be stored, and would come twice."""
    fill(t, {'INBOX': few(5)})
    t.config()
    t.backup()

    def hook(session, tag, name, args):
        for pid in children(process.pid) if name == 'APPEND' else ():
            os.kill(pid, signal.SIGKILL)

    with imapd.Server({'INBOX': imapd.Mailbox()}, session=Target, hook=hook) as server:
        t.config(dict(t.account(server, 'plain'), ssl=False))
        process = subprocess.Popen([*t.program, '--restore', '--yes', t.path], stderr=subprocess.PIPE, text=True)
        while process.stderr.readline().find('a worker died: signal 9') < 0:
            pass
        time.sleep(2)
        process.terminate()
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and len(server.sessions) == 1 and 'NOT ALL' in err, (len(server.sessions), err)


def test_restore_below_a_prefix(t):
    """Another delimiter, a prefix, no LITERAL+: synchronising literals; a part that holds the delimiter."""
    held = fill(t, {'INBOX': few(2), 'A/B.c': few(3, 'x')})
    t.config()
    t.backup()
    for capabilities in ('IMAP4rev1 NAMESPACE', Target.capabilities):
        boxes = {'INBOX': imapd.Mailbox(delimiter='.')}
        restore_to(t, boxes, prefix='INBOX.', delimiter='.', capabilities=capabilities)
        assert sorted(boxes) == ['INBOX', 'INBOX.A.B_c'], boxes
        assert [m.data for m in boxes['INBOX.A.B_c'].mails] == [m.data for m in held['A/B.c']]


def test_restore_to_where_it_came_from(t):
    """All lies below INBOX, and that is no prefix: what is missing goes where the rest is."""
    held = fill(t, {'INBOX': few(2), 'INBOX/A': few(3, 'a'), 'INBOX/A/B': few(2, 'b')})
    t.config()
    t.backup()
    imap = t.imap()
    delete(imap, '2', 'INBOX/A')
    imap.unselect()
    imap.delete('INBOX/A/B')
    t.backup('--restore', '--yes')
    assert {n: alike(m) for n, m in t.held().items()} == {n: alike(m) for n, m in held.items()}


def test_restore_below_a_prefix_over_a_bad_line(t):
    """Wherever it breaks while it lists: nothing is put beside the prefix."""
    held = fill(t, {'INBOX': few(2), 'A': few(3, 'x')})
    t.config()
    t.backup()
    for command in 'LIST', 'NAMESPACE':
        breaks = [command]
        boxes = {'INBOX': imapd.Mailbox(delimiter='.')}
        restore_to(t, boxes, prefix='INBOX.', delimiter='.', hook=lambda session, tag, name, args:
                   name in breaks and (breaks.clear() or session.drop('rst')))
        assert sorted(boxes) == ['INBOX', 'INBOX.A'] and not breaks, boxes
        assert [m.data for m in boxes['INBOX.A'].mails] == [m.data for m in held['A']]


def test_restore_to_another_provider(t):
    """Another prefix and delimiter, other names of what is special, a cut file name; with and without indexes."""
    name = 'a' * 100 + '.' + 'b' * 100
    source = {'INBOX': imapd.Mailbox(few(1), delimiter='.')}
    for i, (box, attributes) in enumerate([('Gesendet', '\\Sent'), ('Entw&APw-rfe', '\\Drafts'), ('Spam', '\\Junk'),
                                           ('A.B', ''), (name, '')]):
        source['INBOX.' + box] = imapd.Mailbox(few(2, 's%d' % i), attributes=attributes, delimiter='.')
    session = type('Source', (Target,), dict(prefix='INBOX.', delimiter='.'))
    with imapd.Server(source, session=session) as server:
        account = {'email': t.email, 'username': 'me', 'password': 'secret', 'host': '127.0.0.1',
                   'port': server.port, 'ssl': False}
        t.config(account)
        t.backup()
        assert not server.faults, server.faults

    def target():
        return {'INBOX': imapd.Mailbox(), **{n: imapd.Mailbox(attributes=a) for n, a in [
            ('Sent Items', '\\Sent'), ('Drafts', '\\Drafts'), ('[Gmail]', '\\Noselect \\Junk'), ('Bulk', '\\Junk')]}}

    boxes = target()
    restore_to(t, boxes)
    ids = {n: sorted(archive.own_id(m.data) for m in b.mails) for n, b in boxes.items()}
    want = {n: sorted(archive.own_id(m.data) for m in b.mails) for n, b in source.items()}
    pairs = [('INBOX', 'INBOX'), ('Gesendet', 'Sent Items'), ('Entw&APw-rfe', 'Drafts'), ('Spam', 'Bulk'),
             ('A.B', 'A/B'), (name, name.replace('.', '/'))]
    for old, new in pairs:
        assert ids.pop(new) == want[old if old == 'INBOX' else 'INBOX.' + old] != [], (old, new)
    assert ids == {'[Gmail]': []}, ids
    boxes = target()
    restore_to(t, boxes, options=('--into', 'Old'))   # one to one
    assert len(boxes['Old/Gesendet'].mails) == 2 and not boxes['Sent Items'].mails, boxes
    boxes = target()
    restore_to(t, boxes, options=('-m', '\\Sent', '-m', 'b*'))
    assert {n for n, b in boxes.items() if b.mails} == {'Sent Items', name.replace('.', '/')}, boxes
    for file in os.listdir(t.archive()):
        if file.endswith('.index'):
            os.unlink(os.path.join(t.archive(), file))
    boxes = target()
    restore_to(t, boxes)
    assert len(boxes['Gesendet'].mails) == len(boxes['A/B'].mails) == 2, boxes


def test_verify_online(t):
    """What the server has is compared by Message-IDs, and a sample octet by octet; nothing is written."""
    mails = few(60) + few(2) + [sample.Mail(d, '', sample.T0) for d in (
        b'', b'X: y', b'no header\r\n\r\n>From \n\x00\r', b'Subject: s\r\n\r\nFrom x\r\n>', b'Subject: s\r\n\r\n\r\n\r\n')]
    box = imapd.Mailbox(mails)
    other = imapd.Mailbox(few(3, 'o'))
    with imapd.Server({'INBOX': box, 'Other': other}) as server:
        t.config({'email': t.email, 'username': 'me', 'password': 'secret', 'host': '127.0.0.1',
                  'port': server.port, 'ssl': False})
        lost = box.mails.pop(30)
        t.backup()
        before = archive.digests(t.dest)
        got = t.backup('--verify', '--online')
        assert re.search(r'INBOX: the server has 0 new mails, 0 have gone; (20|1[5-9]) compared .*, 0 damaged', got.err), got.err
        assert 'Other: the server has 0 new mails, 0 have gone; 3 compared' in got.err, got.err
        other.add(few(4, 'o')[3].data)
        other.expunge(1)
        got = t.backup('--verify', '--online')
        assert 'Other: the server has 1 new mails, 1 have gone; 2 compared' in got.err, got.err
        box.mails.insert(30, lost)
        got = t.backup('--verify', '--online', status=1)
        assert 'the last backup should have, and has not: UID 31' in got.err and ', 1 damaged' in got.err, got.err
        got = json.loads(t.backup('--verify', '--online', '--json', status=1).out)
        entries = got['accounts'][0]['boxes']
        assert [e for e in entries if e['name'] == 'Other' and 'compared' in e][0]['new'] == 1, entries
        assert sum(e.get('failures', 0) for e in entries) == 1 == got['accounts'][0]['failures'], entries
        assert sum(e.get('mails', 0) for e in entries) == 3 + len(archive.read(t.mbox('INBOX'))), entries
        assert archive.digests(t.dest) == before
        assert all('[HEADER' in c.text or 'FETCH' not in c.text or 'PEEK[]' in c.text for c in server.commands)
        # A copy that rotted before its index was made anew: only the server knows.
        del box.mails[30]
        box.mails[20:] = []
        t.backup()
        for m in box.mails:   # in what the server shows
            m.data += b'more\r\n' if m.uid == 5 else b''
        got = t.backup('--verify', '--online', status=1)
        assert "it differs from the server's, UID 5" in got.err and got.err.count('damaged:') == 1, got.err
        assert not server.faults, server.faults


def test_damage_is_told_where_nothing_can_be_noted(t):
    """As on a disk that is mounted read-only: all of it, and that the next backup will not heal it."""
    fill(t, {'INBOX': few(3)})
    t.config()
    t.backup()
    path = t.mbox('INBOX')
    data = bytearray(open(path, 'rb').read())
    for start in [m.start() for m in re.finditer(rb'(?m)^From MAILER', data)]:
        data[start - 4] ^= 1   # the last mail's, and those of the first two
    with open(path, 'wb') as f:
        f.write(data)
    os.mkdir(path + '.index.damaged')
    got = t.backup('--verify', status=1)
    assert got.err.count('damaged: at ') == 3 and got.err.count('cannot create: Is a directory') == 3, got.err
    assert ', 3 damaged' in got.out, got.out
    os.unlink(path + '.index')
    t.backup()   # from here on only the server knows
    got = t.backup('--verify', '--online', status=1)
    assert 'cannot create: Is a directory: the next backup will not heal it' in got.err, got.err
    assert '3 compared octet by octet, 3 damaged' in got.err, got.err


def test_damage_heals(t):
    """What --verify finds damaged is fetched anew by the next backup, and told once; nothing else changes."""
    mails = few(12) + few(3) + [sample.Mail(b'Subject: none\r\n\r\nno ID' + b'x\r\n' * i, '', sample.T0) for i in (1, 2)]
    fill(t, {'INBOX': mails, 'Other': few(3, 'o')})
    t.config()
    t.backup()
    delete(t.imap(), '4')   # without a copy
    t.backup()
    path = t.mbox('INBOX')
    kept = open(path, 'rb').read(), open(path + '.index', 'rb').read()

    def living():
        """A mail without an ID gets a new number when it is stored anew."""
        return sorted((re.sub(rb'\.\d@imap_backup', b'@imap_backup', m.text), m.date) for m in archive.read(path)
                      if not m.state & archive.GONE)
    alive = living()
    starts = [m.start() for m in re.finditer(rb'(?m)^From MAILER', kept[0])]
    for where in (-4, -1, 50, 2, 20):   # at the end of the mail; in our two lines
        data = bytearray(kept[0])
        for k in (0, 3, 6, 13):   # 0 has a second copy, 3 is gone, 13 has no ID, and is the last
            data[(starts + [len(data)])[k + (where < 0)] + where] ^= 1
        for name, octets in (path, data), (path + '.index', kept[1]):
            with open(name, 'wb') as f:
                f.write(octets)
        got = t.backup('--verify', status=1)
        assert ', 4 damaged' in got.out and os.path.exists(path + '.index.damaged'), (where, got)
        before = archive.digests(t.dest)
        got = t.backup('-n')
        assert archive.digests(t.dest) == before
        got = t.backup()
        assert '4 damaged mails are marked as gone' in got.err and 'INBOX: 3 new, 0 gone' in got.err, (where, got.err)
        now = archive.read(path)
        assert living() == alive, where
        assert len(now) == len(starts) + 3 and not os.path.exists(path + '.index.damaged'), where
        t.backup('--verify')
        before = archive.digests(t.dest)
        got = t.backup()
        assert '(2 without news)' in got.err and archive.digests(t.dest) == before, (where, got.err)
        os.unlink(path + '.index')
        t.backup()
        if where < -1:   # else the old copy is as good as the new one by now
            assert [m.state for m in now] == [m.state for m in archive.read(path)], where


def test_damage_that_moves_the_rest_heals(t):
    """An octet more or less; the end of one mail and the beginning of the next are lost, or where mails begin."""
    held = fill(t, {'INBOX': [sample.Mail(b'Message-ID: <%d@x>\r\n\r\nfew words\r\n' % i, '', sample.T0) for i in range(3)] + few(5)})
    t.config()
    t.backup()
    path = t.mbox('INBOX')
    kept = open(path, 'rb').read(), open(path + '.index', 'rb').read()
    starts = [m.start() for m in re.finditer(rb'(?m)^From MAILER', kept[0])]
    for k, at in enumerate(starts):
        nothing = bytes(600)   # as a sector that is lost; it may hold the beginnings of several mails
        middle = kept[0].index(b'\n\n', at) + 5
        for data in kept[0][:middle] + b'!' + kept[0][middle:], kept[0][:middle] + kept[0][middle + 1:], \
                kept[0][:middle] + kept[0][(starts + [len(kept[0])])[k + 1] + 20:], \
                (kept[0][:at] + nothing + kept[0][at + len(nothing):])[:len(kept[0])]:
            for name, octets in (path, data), (path + '.index', kept[1]):
                with open(name, 'wb') as f:
                    f.write(octets)
            t.backup('--verify', status=1)
            t.backup()
            living = [m for m in archive.read(path) if not m.state & archive.GONE]
            assert sorted(m.text for m in living) == sorted(
                archive.quote(m.data.replace(b'\r\n', b'\n')) for m in held['INBOX']), k


def test_much_damage_heals(t):
    """However many mails are noted, and however often, none is left out."""
    fill(t, {'INBOX': few(270)})
    t.config()
    t.backup()
    with open(t.mbox(), 'r+b') as f:
        octets = bytearray(f.read())
        f.seek(0)
        for m in re.finditer(rb'(?m)^Subject: ', octets):
            octets[m.end()] ^= 1
        f.write(octets)
    for _ in range(2):
        assert ', 270 damaged' in t.backup('--verify', status=1).out
    got = t.backup()
    assert '270 damaged mails are marked as gone' in got.err and 'INBOX: 270 new, 0 gone' in got.err, got.err
    t.backup('--verify')


def test_an_octet_that_cannot_be_read(t):
    """As in a bad sector: all other mails are verified, exported, restored; what can be healed is, and it is told."""
    held = fill(t, {'INBOX': [m._replace(data=m.data + b'line\r\n' * 2000) for m in few(20)], 'Other': few(3, 'o')})
    held = {name: sorted(m.data for m in mails) for name, mails in held.items()}
    t.config()
    t.backup()
    path, library = t.mbox(), os.path.join(t.folder, 'faults.so')
    subprocess.run(['cc', '-shared', '-fPIC', '-o', library, os.path.join(os.path.dirname(__file__), 'faults.c')], check=True)
    starts = [m.start() for m in re.finditer(rb'(?m)^From MAILER', open(path, 'rb').read())]
    for octet, harm, heals in (starts[9] + 1000, 1, '1 damaged'), (starts[5] - 10, 2, '2 damaged'), (2, 1, ''):
        bad = {'LD_PRELOAD': library, 'FAULTS_UNREAD': '%d %s' % (octet, path)}
        t.config()
        got = t.backup('--verify', status=1, env=bad)
        assert re.search('INBOX: 2[013] mails', got.out) and 'cannot read at %d: Input/output' % octet in got.err, (octet, got)
        assert os.path.exists(path + '.index.damaged') and got.err.count('damaged: at ') == harm, (octet, got)
        got = t.backup('--export-all', '-m', 'INBOX', status=1, env=bad)
        assert sum(d.decode().replace('\r', '') in got.out for d in held['INBOX']) == 20 - harm and 'cannot read at' in got.err, (octet, got.err)
        t.config(t.account(username=t.user + str(octet)))
        got = t.backup('--restore', '--yes', status=1, env=bad)
        now = {name: sorted(m.data for m in mails) for name, mails in there(t, t.user + str(octet)).items()}
        assert now['Other'] == held['Other'] and 'cannot read at %d' % octet in got.err, (octet, got.err)
        assert len(set(held['INBOX']) - set(now['INBOX'])) == harm, (octet, got.err)
        t.config()
        got = t.backup(env=bad)
        assert heals in got.err and ('are marked as gone' in got.err) == (heals != ''), (octet, got.err)
    for octet, said in (2148, 'a record of the index is damaged'), (1540, 'index does not fit'), (10, 'index does not fit'):
        bad['FAULTS_UNREAD'] = '%d %s.index' % (octet, t.mbox('Other'))
        fill(t, {'Other': few(1, 'o%d' % octet)})
        assert said in t.backup('--verify', '-m', 'Other', env=bad).err, octet
        assert 'Other: index does not fit the mbox: rebuilt' in t.run('-m', 'Other', env=bad).err, octet
        t.backup('-m', 'Other')   # as what is written can be read again
        assert t.backup('--verify', '-m', 'Other').err == '', octet


def test_restore_cut_anywhere(t):
    """The line breaks before or after each command; or the target refuses, limits, wants to be told to create."""
    mails = few(8) + [sample.Mail(b'Subject: none\r\n\r\nno ID' + b'x\r\n' * i, '', sample.T0) for i in (1, 2)]
    held = fill(t, {'INBOX': mails, 'A/B': few(3, 'x')})
    t.config()
    t.backup()

    def same(boxes, what):
        for name in held:
            assert sorted(m.data for m in boxes[name].mails) == sorted(m.data for m in held[name]), what

    def cut(k, before):
        def hook(session, tag, name, args):
            session.count = getattr(session, 'count', 0) + 1
            if session.number == 1 and session.count == k:
                if not before:
                    getattr(session, 'cmd_' + name)('x', args)
                    session.output = b''
                session.drop('rst')
        return hook

    for before in True, False:
        for k in range(4 + before, 21, 2):
            boxes = {'INBOX': imapd.Mailbox()}
            got, lines = restore_to(t, boxes, hook=cut(k, before))
            same(boxes, (k, before, got.err))
    small = 'IMAP4rev1 NAMESPACE LITERAL-'
    for capabilities in small, small + ' APPENDLIMIT=5000':
        boxes = {'INBOX': imapd.Mailbox([m for m in mails[:3]]), 'A': imapd.Mailbox()}
        got, lines = restore_to(t, boxes, capabilities=capabilities)
        same(boxes, capabilities)
        got, lines = restore_to(t, boxes, capabilities=capabilities)
        assert not any(re.match('APPEND|CREATE', line) for line in lines), lines
    limit = sorted(len(m.data) for m in held['INBOX'])[5]
    boxes = {'INBOX': imapd.Mailbox(), 'A/B': imapd.Mailbox()}
    got, lines = restore_to(t, boxes, status=1, capabilities=small + ' APPENDLIMIT=%d' % limit)
    sizes = [len(m.data) for m in boxes['INBOX'].mails]
    assert len(sizes) == sum(len(m.data) <= limit for m in held['INBOX']) and max(sizes) == limit, (limit, sizes)
    assert 'and the server takes %d' % limit in got.err, got.err

    class Vanishing(Target):   # the mailbox goes when it has been opened
        def cmd_SELECT(self, tag, args):
            super().cmd_SELECT(tag, args)
            if 'A/B' in args and 'A/B' not in self.server.gone:
                self.server.gone.append('A/B')
                del self.boxes['A/B']

        def cmd_APPEND(self, tag, args):
            if args.split()[0].strip('"') not in self.boxes:
                return self.no(tag, '[TRYCREATE] no such mailbox')
            super().cmd_APPEND(tag, args)

    boxes = {'INBOX': imapd.Mailbox(), 'A/B': imapd.Mailbox()}
    got, lines = restore_to(t, boxes, base=Vanishing)
    same(boxes, lines)

    class Existing(Target):   # as Cyrus: what it has made unasked is refused in words only
        def cmd_CREATE(self, tag, args):
            super().cmd_CREATE(tag, args)
            self.output = self.output.replace(b' OK ', b' NO ')

    boxes = {'INBOX': imapd.Mailbox()}
    got, lines = restore_to(t, boxes, base=Existing)
    same(boxes, lines)


def test_restore_waits_seldom(t):
    """As many mails are on their way as a line with delay takes; 37 at a time would make this 50 waits."""
    boxes = {'INBOX': imapd.Mailbox(list(sample.many(1500)))}
    with scripted(t, boxes):
        t.backup()
    boxes = {'INBOX': imapd.Mailbox()}
    with scripted(t, boxes, session=type('Slow', (Target,), dict(lag=0.05))) as server:
        t.backup('--restore', '--yes')
        assert len(boxes['INBOX'].mails) == 1500 and server.waits() < 25, server.waits()


def test_restore_once_at_a_time(t):
    """Two restores of an account would put all of it there twice: the second one says so, and sends nothing."""
    fill(t, {'INBOX': few(5)})
    t.config()
    t.backup()
    first, go = threading.Event(), threading.Event()

    def hook(session, tag, name, args):
        if name == 'SELECT' and session.number == 1:
            first.set()
            go.wait(20)
    boxes = {'INBOX': imapd.Mailbox()}
    with scripted(t, boxes, session=Target, hook=hook):
        running = subprocess.Popen([*t.program, '-q', '--restore', '--yes', t.path])
        assert first.wait(20)
        got = t.backup('--restore', '--yes', status=3)
        go.set()
        assert running.wait(20) == 0 and 'another run is at work' in got.err and len(boxes['INBOX'].mails) == 5, got.err


def test_restore_of_an_original(t):
    """An archive of the Python original; also a mail whose ID it overlooked, so that it made one."""
    date = b'Date: Tue, 2 Jan 2018 03:04:05 +0100\n'
    made = b'Message-ID: <0123456789012345678901234567890123456789@imap_backup.py.local>\n'
    texts = [b'Message-ID: <1@x>\n' + date + b'\n>From a\nlast', b'Message-ID:<2@x>\n' + date + b'\ntwo',
             b'Message-ID: <3@x>\n' + date + b'\ngone']
    os.makedirs(t.archive())
    with open(t.mbox('INBOX'), 'wb') as f:
        for text, head, state in zip(texts, (b'', made, b''), (b'0001', b'0000', b'0009')):
            f.write(b'From nobody Mon Jan  1 00:00:00 2018\nX-Mozilla-Status: ' + state + b'\n' + head + text + b'\n\n')
    boxes = {'INBOX': imapd.Mailbox()}
    for _ in range(2):
        restore_to(t, boxes)
        assert [m.data for m in boxes['INBOX'].mails] == [
            text.replace(b'>From', b'From').replace(b'\n', b'\r\n') + b'\r\n' for text in texts[:2]], boxes['INBOX'].mails
    assert {m.when for m in boxes['INBOX'].mails} == {1514858645} and boxes['INBOX'].mails[0].flags == {'\\Seen'}


def test_restore_below_nothing(t):
    """A name that only stands for what is below it can still be made a mailbox: on a real server, too."""
    held = fill(t, {'INBOX': few(1), 'A': few(2, 'a'), 'A/B': few(3, 'b')})
    t.config()
    t.backup()
    other = t.user + 'b'
    t.config(t.account(username=other))
    t.backup('--restore', '--yes', '-m', 'A/B')   # the archive's name is the first, so a signal can leave it so
    t.backup('--restore', '--yes')
    assert {k: alike(v) for k, v in there(t, other).items()} == {k: alike(v) for k, v in held.items()}


def test_restore_names_too_long_for_a_record(t):
    """Escaped, a name can be longer than what a process may report at once: --json does without it."""
    name = '"' * 1000
    boxes = {'INBOX': imapd.Mailbox(list(few(2))), name: imapd.Mailbox(list(few(3, 'long')))}
    with imapd.Server(boxes, session=Target) as server:
        t.config({'email': t.email, 'username': 'me', 'password': 'secret', 'host': '127.0.0.1',
                  'port': server.port, 'ssl': False})
        t.backup()
    there = {'INBOX': imapd.Mailbox(), name: imapd.Mailbox()}
    got, lines = restore_to(t, there, options=('--json', '-n'))
    told = json.loads(got.out)['accounts'][0]
    assert [box['name'] for box in told['boxes']] == ['INBOX'] and told['failures'] == 0, got.out


def test_restore_asks(t):
    """On a terminal, once, before anything is sent; every other answer than yes means no."""
    fill(t, {'INBOX': few(3)})
    t.config()
    t.backup()
    other = t.user + 'b'
    t.config(t.account(username=other))
    for answer, status in ((b'n\n', 1), (b'\n', 1), (b'\x04', 1), (b'\x03', 1), (b'yes, please\n', 1), (b'y\n', 0),
                           (b'yes\n', 0)):
        pid, fd = pty.fork()
        if pid == 0:
            os.execv(t.program[0], [*t.program, '--restore', '--json', t.path])
        said = b''
        while b'[y/N] ' not in said:
            said += os.read(fd, 1000)
        assert b'3 mails, 0 of them gone' in said and other.encode() in said, said
        os.write(fd, answer)
        try:
            while True:
                got = os.read(fd, 1000)
                if not got:
                    break
                said += got
        except OSError:
            pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status, (answer, said)
        os.close(fd)
        assert json.loads(said[said.index(b'{'):said.rindex(b'}') + 1])['status'] == status, said   # after Ctrl-C, too
        assert len(there(t, other).get('INBOX', [])) == (0 if status else 3), (answer, said)


def test_restore_of_6000(t):
    """Of an archive without an index; killed twice on its way. Nothing twice, nothing missing."""
    os.makedirs(t.archive())
    mails = list(sample.many(6000, 3, 300))
    with open(t.mbox('INBOX'), 'wb') as f:
        for m in mails:
            f.write(b'From MAILER-DAEMON Wed Jan  1 12:00:00 2020\nX-Mozilla-Status: 0001\n' +
                    m.data.replace(b'\r\n', b'\n') + b'\n')
    t.config()
    for many in 1000, 3000:
        running = subprocess.Popen([*t.program, '-q', '--restore', '--yes', t.path])
        while running.poll() is None and count(t, t.user) < many:
            time.sleep(0.05)
        running.kill()
        running.wait()
        settled(t, t.user)
    got = t.backup('--restore', '--yes', timeout=300)
    now = there(t, t.user)['INBOX']
    assert len(now) == 6000 and sorted(m.data for m in now) == sorted(m.data for m in mails), got.err
    assert {m.when for m in now} == {1577880000} and {m.state for m in now} == {1}
