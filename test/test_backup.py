"""The whole program against a real server, Dovecot."""
import imaplib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import termios
import time

import archive
import imapd
import sample
import servers
from run import PROGRAM, T, children


def fill(t, boxes, server=None):
    """Deliver {mailbox: [Mail]}; what the server holds then."""
    imap = t.imap(server)
    for name, mails in boxes.items():
        sample.deliver(imap, name, mails)
    return t.held(server)


def few(n=3, label='m'):
    rng = random.Random(label)
    return [sample.mail(rng, '%s %d' % (label, i)) for i in range(n)]


def uids(imap, *query):
    return imap.uid('SEARCH', *(query or ('ALL',)))[1][0].decode().split()


def delete(imap, uids, mailbox='INBOX'):
    """Only these: other mails have \\Deleted too, as their flag."""
    imap.select(mailbox)
    imap.uid('STORE', uids, '+FLAGS', '\\Deleted')
    assert imap.uid('EXPUNGE', uids)[0] == 'OK'


def states(t, name='INBOX'):
    return [s.state for s in archive.read(t.mbox(name))]


def test_everything_over_tls(t):
    """Varied and awkward mails in nested and non-ASCII mailboxes, compared octet by octet."""
    held = fill(t, sample.boxes(mails=120))
    t.config()
    t.backup()
    t.same(held)
    before = archive.digests(t.dest)
    got = t.backup('-v')
    assert '(11 without news): 0 new' in got.err, got.err
    assert archive.digests(t.dest) == before
    assert oct(os.stat(t.archive()).st_mode & 0o777) == '0o700'


def test_forged_mails(t):
    """Made to break the archive, the forger in front of the victim and behind it; compared with what Dovecot
    makes of them: a bare LF is CRLF, NUL is 0x80."""
    mails = [sample.Mail(data, '', sample.T0 + i) for i, data in enumerate(sample.forged(random.Random(1)))]
    held = fill(t, {'INBOX': mails, 'Reversed': mails[::-1]})
    assert len(held['INBOX']) > len(mails) // 2   # NUL may be refused
    # Dovecot's cache has a field's name up to a NUL: asked for the Message-ID, it tells one that the mail itself
    # does not have (2.4 at once, 2.3 once it was asked). Such a mail is fetched again where the index is lost.
    lies = set()
    for name in held:
        imap = t.imap()
        imap.select(name, readonly=True)
        for m in held[name]:
            for _ in range(2):
                told = imap.uid('FETCH', str(m.uid), '(BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])')[1][0][1]
            if archive.own_id(told) != archive.own_id(m.data):
                lies.add(m.uid)
        imap.logout()
    assert len(lies) <= 2, lies
    t.config()
    t.backup()
    t.same(held)
    before = archive.digests(t.dest)
    for lost in ((), held):
        for name in lost:
            os.unlink(t.mbox(name) + '.index')
        t.dovecot().trace(t.user)
        got = t.backup()
        assert ': 0 new, 0 gone, 0 back' in got.err and archive.digests(t.dest) == before, got.err
        again = [u for c in t.dovecot().commands(t.user) if 'BODY.PEEK[]' in c for u in imapd.uids_of(c.split()[2])]
        assert set(again) <= (lies if lost else set()), again


def test_starttls_and_clear(t):
    held = fill(t, {'INBOX': few(), 'A/B': few(2)})
    for mode, more in (('starttls', {}), ('clear', {'ssl': False, 'host': '127.0.0.1'})):
        t.config(t.account(mode='plain', **more))
        got = t.backup('-vv')
        assert ('STARTTLS' in got.err.split('CAPABILITY')[1]) and servers.PASSWORD not in got.err
        t.same(held)


def test_no_news_opens_nothing(t):
    fill(t, {'INBOX': few(), 'A': few(), 'B/C': []})
    t.config()
    t.backup()
    t.dovecot().trace(t.user)
    got = t.backup('-v')
    commands = t.dovecot().commands(t.user)
    assert not [c for c in commands if re.match('EXAMINE|SELECT|UID', c)], commands
    assert [c for c in commands if c.startswith('LIST')], commands
    assert int(re.search(r'(\d+) waits', got.err).group(1)) <= 7, got.err
    t.config(t.account(mode='starttls'))
    got = t.backup('-v')
    assert int(re.search(r'(\d+) waits', got.err).group(1)) <= 9, got.err


def test_new_gone_moved_flagged_back(t):
    imap = t.imap()
    held = fill(t, {'INBOX': few(30), 'Work': few(3, 'w')})
    t.config()
    t.backup()
    imap.select('INBOX')
    gone = [m for m in held['INBOX'] if m.uid in (1, 2, 30)]
    imap.uid('STORE', '5', '+FLAGS', '(\\Flagged \\Answered $Forwarded)')
    imap.uid('COPY', '10:11', 'Work')
    moved = [m for m in held['INBOX'] if m.uid in (10, 11)]
    delete(imap, '1:2,10:11,30')
    sample.deliver(imap, 'INBOX', few(4, 'new'))
    now = t.held()
    got = t.backup('-v')
    assert 'INBOX: 4 new, 5 gone, 0 back' in got.err and 'Work: 2 new' in got.err, got.err
    t.same(now, gone={'INBOX': gone + moved})
    size = os.path.getsize(t.mbox())
    imap.select('Work')
    imap.uid('COPY', uids(imap)[-1], 'INBOX')   # one comes back
    imap.select('INBOX')
    got = t.backup('-v')
    assert 'INBOX: 0 new, 0 gone, 1 back' in got.err, got.err
    assert os.path.getsize(t.mbox()) == size
    t.same(t.held(), gone={'INBOX': gone + moved[:1]})


def test_nothing_is_sent_but_reading(t):
    """No SELECT, STORE, EXPUNGE; batches and lines as configured."""
    fill(t, {'INBOX': few(120)})
    imap = t.imap()
    delete(imap, ','.join(str(n) for n in range(1, 120, 2)))
    t.config(email_batch_size=7, header_batch_size=11)
    t.dovecot().trace(t.user)
    t.backup()
    sample.deliver(imap, 'INBOX', few(60, 'x'))
    t.backup()
    commands = t.dovecot().commands(t.user)
    allowed = r'AUTHENTICATE|CAPABILITY|ID |NAMESPACE|LIST|STATUS|EXAMINE|UID SEARCH|UID FETCH|LOGOUT|NOOP'
    for c in commands:
        assert re.match(allowed, c) and 'BODY[' not in c and len(c) < 1000, c
        m = re.match(r'UID FETCH (\S+) \(UID FLAGS (INTERNALDATE|BODY)', c)
        if m:
            n = sum(int(r.split(':')[-1]) - int(r.split(':')[0]) + 1 for r in m.group(1).split(','))
            assert n <= (7 if m.group(2) == 'INTERNALDATE' else 11), c
    t.same(t.held())


def test_duplicates_once_and_all(t):
    a, b = (sample.Mail(b'Message-ID: <same@x>\r\n\r\n%s\r\n' % x, '', sample.T0 + n)
            for n, x in enumerate((b'one', b'two')))
    fill(t, {'INBOX': [a, b, a] + few(2)})
    t.config()
    got = t.backup()
    assert '3 new' in got.err and '2 duplicates left out' in got.err, got.err
    assert len(archive.read(t.mbox())) == 3
    t.config(keep_duplicates=True)
    got = t.backup()
    assert '2 new' in got.err, got.err
    t.same(t.held(), duplicates=True)
    before = archive.digests(t.dest)
    assert '1 without news' in t.backup().err
    os.unlink(t.mbox() + '.index')
    t.backup()
    assert archive.digests(t.dest) == before
    t.config()
    t.backup()
    assert archive.digests(t.dest) == before
    # Gone only when the last UID with this Message-ID is.
    imap = t.imap()
    for uid, gone in (('1', 0), ('3', 0), ('2', 3)):
        delete(imap, uid)
        t.backup()
        assert sum(s & 8 > 0 for s in states(t)) == gone, (uid, states(t))


def test_twins_without_an_id_are_all_stored(t):
    """Also where the server mixes the answers to commands that run at a time, as Dovecot does."""
    head = b'From: a@x\r\nSubject: draft\r\n\r\n'
    mails = [sample.Mail(head + b'%d ' % i + b'x' * (200_000 if i % 5 == 0 else 20) + b'\r\n', '', sample.T0 + i)
             for i in range(120)]
    sample.fill_maildir(t.dovecot().maildir(t.user), mails[:60] + few(40) + mails[60:])
    t.dovecot().own(t.dovecot().home(t.user))
    held = t.held()
    t.config(email_batch_size=3, header_batch_size=7)
    t.backup()
    t.same(held)
    delete(t.imap(), '17')
    t.backup()
    gone = [s.date for s in archive.read(t.mbox()) if s.state & archive.GONE]
    assert gone == [archive.from_date(m.when) for m in held['INBOX'] if m.uid == 17], gone
    t.dovecot().new_uidvalidity(t.user)
    got = t.backup()
    assert ' 0 new, 0 gone, 0 back' in got.err, got.err
    os.remove(t.mbox() + '.index')
    got = t.backup()
    assert ' 0 new, 0 gone, 0 back' in got.err, got.err


def test_uidvalidity_and_lost_index_download_nothing(t):
    fill(t, {'INBOX': [m for _, m in sample.awkward()] + few(20), 'Box': few(5, 'b')})
    t.config()
    t.backup()
    before = archive.digests(t.dest)
    t.dovecot().new_uidvalidity(t.user)
    t.dovecot().new_uidvalidity(t.user, 'Box')
    got = t.backup('-v')
    assert ' 0 new, 0 gone, 0 back' in got.err.splitlines()[-2], got.err
    assert archive.digests(t.dest) == before
    for name in ('INBOX', 'Box'):
        os.unlink(t.mbox(name) + '.index')
    got = t.backup('-v')
    assert ' 0 new, 0 gone, 0 back' in got.err.splitlines()[-2] and 'rebuilt' in got.err, got.err
    assert archive.digests(t.dest) == before
    t.same(t.held())


def test_uidvalidity_with_changes(t):
    held = fill(t, {'INBOX': few(20)})
    t.config()
    t.backup()
    imap = t.imap()
    delete(imap, '3')
    imap.uid('STORE', '4', 'FLAGS', '(\\Flagged)')
    sample.deliver(imap, 'INBOX', few(2, 'new'))
    imap.logout()
    t.dovecot().new_uidvalidity(t.user)
    got = t.backup('-v')
    assert 'INBOX: 2 new, 1 gone' in got.err, got.err
    t.same(t.held(), gone={'INBOX': [m for m in held['INBOX'] if m.uid == 3]})


def test_without_extensions(t):
    """CONDSTORE, ESEARCH, LIST-STATUS, SASL-IR switched off: the plain ways."""
    server = t.dovecot('bare', capability='IMAP4rev1')
    imap = t.imap(server)
    held = fill(t, {'INBOX': few(30), 'A': few(2)}, server)
    t.config(t.account(server))
    t.backup()
    t.same(held)
    got = t.backup()
    assert '(2 without news)' in got.err, got.err
    imap.select('INBOX')
    imap.uid('STORE', '4:6', 'FLAGS', '(\\Flagged)')
    delete(imap, '9')
    server.trace(t.user)
    got = t.backup('-v')
    assert 'INBOX: 0 new, 1 gone' in got.err, got.err
    commands = server.commands(t.user)
    assert 'UID SEARCH ALL' in commands and 'UID FETCH 1:30 (FLAGS)' in commands, commands
    assert not [c for c in commands if 'RETURN' in c or 'CHANGEDSINCE' in c], commands
    t.same(t.held(server), gone={'INBOX': [m for m in held['INBOX'] if m.uid == 9]})


def test_with_each_extension_off(t):
    full = ('IMAP4rev1 SASL-IR ID ENABLE LITERAL+ ESEARCH LIST-EXTENDED LIST-STATUS CONDSTORE UIDPLUS')
    for off in ('ESEARCH', 'CONDSTORE', 'LIST-STATUS', 'LITERAL+'):
        server = t.dovecot('no' + off, capability=full.replace(' ' + off, ''))
        held = fill(t, {'INBOX': few(5, off), 'Ü/x': few(2, off)}, server)
        t.config(t.account(server), destination=t.dest + off)
        t.dest += off
        t.backup()
        t.same(held)
        assert '(2 without news)' in t.backup().err


ORIGINAL = ('From nobody Thu Jan  2 00:00:00 2020\nX-Mozilla-Status: 0001\n%s\n\n')


def original(mails):
    """An archive as the Python original wrote it: bodies stripped, only "From " quoted."""
    out = b''
    for m in mails:
        text = archive.lines_of(m.data).strip()
        head = b''
        if archive.own_id(m.data) == b'' or b'Message-Id:<' in m.data:
            head = b'Message-ID: ' + archive.made_id(m.fields) + b'\n'
        out += b'From nobody Thu Jan  2 00:00:00 2020\nX-Mozilla-Status: 0001\n' + head + \
            re.sub(rb'(?m)^From ', b'>From ', text) + b'\n\n'
    return out


def test_original_archives_are_continued(t):
    extra = [sample.Mail(b'Subject: no id\r\nFrom: x@y\r\n\r\nFrom here\r\n', '\\Seen', 5),
             sample.Mail(b'Message-Id:<without.blank@x>\r\nSubject: s\r\n\r\nbody\r\n', '\\Seen', 6)]
    held = fill(t, {'INBOX': few(8) + extra, 'Entwürfe/Größe': few(3, 'e')})
    os.makedirs(t.archive())
    wire = sample.mutf7('Entwürfe/Größe')
    old = re.sub(r'[^a-zA-Z0-9._ -]', '', wire.replace('/', '.')) + '.mbox'
    for name, mails in ((os.path.basename(t.mbox()), held['INBOX']), (old, held[wire])):
        with open(os.path.join(t.archive(), name), 'wb') as f:
            f.write(original(mails))
    t.config()
    got = t.backup('-v')
    assert ' 0 new, 0 gone, 0 back' in got.err.splitlines()[-2], got.err
    assert 'renamed' in got.err and os.path.exists(t.mbox('Entwürfe/Größe')), got.err
    with open(t.mbox('INBOX'), 'rb') as f:
        data = f.read()
    flagged = [s for s in re.findall(rb'X-Mozilla-Status: (....)', data)]
    assert flagged == [b'%04x' % m.state for m in held['INBOX']], flagged
    assert ', 0 damaged' in t.backup('--verify', '--online').err   # also where it put an ID in front of one that it overlooked
    imap = t.imap()
    delete(imap, '1')
    sample.deliver(imap, 'INBOX', few(1, 'new'))
    assert 'INBOX: 1 new, 1 gone' in t.backup().err
    with open(t.mbox('INBOX'), 'rb') as f:
        assert f.read().startswith(b'From nobody Thu Jan  2 00:00:00 2020\nX-Mozilla-Status: %04x\n'
                                   % (held['INBOX'][0].state | 8))


def test_an_older_index_is_no_harm(t):
    fill(t, {'INBOX': few(5)})
    t.config()
    t.backup()
    old = open(t.mbox() + '.index', 'rb').read()
    sample.deliver(t.imap(), 'INBOX', few(5, 'later'))
    t.backup()
    before = archive.digests(t.dest)
    with open(t.mbox() + '.index', 'wb') as f:
        f.write(old)
    got = t.backup('-v')
    assert archive.digests(t.dest) == before and 'taken over' in got.err, got.err
    for damage in (b'', b'junk', old[:2600], old[:3000] + b'\xff' + old[3001:], old[:-10]):
        with open(t.mbox() + '.index', 'wb') as f:
            f.write(damage)
        t.backup()
        assert archive.digests(t.dest) == before, damage[:10]
    t.same(t.held())


def test_a_torn_tail_without_a_mark_is_fetched_again(t):
    """No index, and the last mail was cut off by somebody: the server still has it."""
    held = fill(t, {'INBOX': few(4)})
    t.config()
    t.backup()
    os.unlink(t.mbox() + '.index')
    whole = open(t.mbox(), 'rb').read()
    with open(t.mbox(), 'wb') as f:
        f.write(whole[:-30])
    got = t.backup('-v')
    assert 'INBOX: 1 new' in got.err, got.err
    stored = archive.read(t.mbox())
    assert [s.state & 8 for s in stored] == [0, 0, 0, 8, 0]
    assert stored[4].text == archive.quote(held['INBOX'][3].data)
    assert '(1 without news)' in t.backup().err


def test_a_mail_reader_changed_the_archive(t):
    """Compacted: shorter, other offsets. Nothing that is still there is downloaded."""
    fill(t, {'INBOX': few(6)})
    t.config()
    t.backup()
    data = open(t.mbox(), 'rb').read()
    mails = re.split(rb'(?m)^(?=From )', data)[1:]
    with open(t.mbox(), 'wb') as f:
        f.write(b''.join(mails[:2] + mails[3:]))
    got = t.backup('-v')
    assert 'INBOX: 1 new' in got.err and 'rebuilt' in got.err, got.err
    assert sorted(s.text for s in archive.read(t.mbox())) == sorted(
        archive.quote(m.data) for m in t.held()['INBOX'])


def test_accounts_and_limits(t):
    """Limits on processes, measured at the server; every account is backed up."""
    accounts = []
    for i in range(3):
        t.user = '%sa%d' % (t.user[:20], i)
        t.email = t.user + '@example.org'
        fill(t, {'B%d' % k: few(20, 'x%d' % k) for k in range(6)})
        accounts.append(t.account(**({'processes_per_account': 1} if i == 0 else {})))
    t.config(*accounts, total_processes=4, processes_per_account=2)
    begin = time.time()
    t.backup()
    for i, a in enumerate(accounts):
        spans = [s for s in t.dovecot().sessions(a['username']) if s[0] >= begin - 0.01]
        peak = max(sum(1 for b, e in spans if b <= s[0] < e - 0.02) for s in spans)
        assert peak <= (1 if i == 0 else 2), (i, peak)
        t.email, t.user = a['email'], a['username']
        t.same(t.held())


def test_account_and_mailbox_options(t):
    fill(t, {'INBOX': few(), 'Work/a': few(), 'Work/b': few(), 'Play': few()})
    t.config(t.account(), t.account(email='other@example.org', password='wrong'))
    t.backup('-a', t.email, '-m', 'work/*', '-m', 'Work/a')
    assert os.listdir(t.dest) == [t.email]
    assert os.path.exists(t.mbox('Work/a')) and not os.path.exists(t.mbox('Play'))
    t.backup('-a', t.email, '--mailbox=Wor?/b')
    assert os.path.exists(t.mbox('Work/b'))
    t.backup('-a', 'nobody@example.org', status=2)


def test_ignored_mailboxes(t):
    fill(t, {'INBOX': few(1), 'Tasks': few(1), 'A/Tasks/b': few(1), 'Ä-box': few(1), 'Ä-box/x': few(1),
             'Keep': few(1)})
    t.config(t.account(ignore_mailboxes=['Ä*']), ignore_mailboxes=['Tasks', 'inbox'])
    t.backup()
    found = sorted(n for n in os.listdir(t.archive()) if n.endswith('.mbox'))
    assert found == ['Keep.mbox'], found


def test_list_check_and_dry_run_change_nothing(t):
    held = fill(t, {'INBOX': few(5), 'Entwürfe': few(2)})
    t.config()
    got = t.backup('--list')
    assert re.search(r'INBOX +5 .* never +INBOX.mbox', got.out) and 'Entwürfe' in got.out, got.out
    got = t.backup('--check')
    assert t.certs.fingerprint() in got.out and 'login works' in got.out, got.out
    got = t.backup('-n')
    assert '7 would be fetched' in got.err, got.err
    assert not os.path.exists(t.dest)
    t.backup()
    sample.deliver(t.imap(), 'INBOX', few(2, 'n'))
    before = archive.digests(t.dest)
    got = t.backup('--dry-run')
    assert 'INBOX: 2 would be fetched' in got.err, got.err
    assert archive.digests(t.dest) == before
    t.backup()
    t.same(t.held())
    assert re.search(r'INBOX +7 .*20\d\d-', t.backup('--list').out)
    assert len(held) == 2


def test_quiet_is_quiet_and_json_of_secrets_is_none(t):
    fill(t, {'INBOX': few(2)})
    t.config()
    got = t.backup('-q')
    assert got.err == '' and got.out == '', got
    for mode, options in (('tls', {}), ('plain', {})):
        t.config(t.account(mode=mode, **options))
        got = t.backup('-vv')
        for secret in (servers.PASSWORD, 'AHU'):   # base64 of \0u...
            assert secret not in got.err.replace('secrets', ''), got.err


def test_wrong_password_is_tried_once(t):
    fill(t, {'INBOX': few(1)})
    good = t.account()
    bad = t.account(email='bad@example.org', username=t.user + 'bad', password='nonsense')
    t.config(bad, good, retries=5)
    got = t.backup('-v', status=1)
    assert 'AUTHENTICATIONFAILED' in got.err and 'bad@example.org: 1 connection,' in got.err, got.err
    t.same(t.held())


def test_password_command(t):
    fill(t, {'INBOX': few(1)})
    account = t.account(password_command='echo ' + servers.PASSWORD)
    del account['password']
    t.config(account)
    t.backup()
    account['password_command'] = 'false'
    t.config(account)
    assert 'password_command' in t.backup(status=1).err


def test_one_run_at_a_time(t):
    import fcntl
    fill(t, {'INBOX': few(2)})
    t.config()
    t.backup()
    with open(os.path.join(t.archive(), '.lock'), 'r+') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        got = t.backup(status=3)
        assert 'another run' in got.err, got.err
    sample.deliver(t.imap(), 'INBOX', few(1, 'n'))
    with open(t.mbox(), 'r+') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        t.backup(status=3)
    t.backup()
    t.same(t.held())


def test_success_and_failure_url(t):
    fill(t, {'INBOX': few(1)})
    web = servers.Web()
    t.cleanups.append(web.stop)
    t.config(start_url=web.url + '/go', success_url=web.url + '/ok', failure_url=web.url + '/bad')
    t.backup()
    assert web.requests == ['/go', '/ok'], web.requests
    for args in (('-n',), ('-a', t.email), ('-m', 'INBOX'), ('--list',), ('--check',)):
        t.backup(*args)
    assert web.requests == ['/go', '/ok'], web.requests
    web.requests.clear()
    t.config(t.account(password='wrong'), success_url=web.url + '/ok', failure_url=web.url + '/bad')
    t.backup(status=1)
    assert web.requests == ['/bad'], web.requests
    moody = servers.Web(answers=(503, '/elsewhere', 200))
    t.cleanups.append(moody.stop)
    t.config(success_url=moody.url + '/x')
    t.backup()
    assert moody.requests == ['/x', '/x', '/elsewhere'], moody.requests
    t.config(success_url='http://user:pass@word@127.0.0.1:9/uuid?key#part')   # what may be shown of it
    err = t.backup('-vv').err
    assert 'warning: http://127.0.0.1:9: ' in err, err
    for secret in ('user:', 'word', 'uuid', 'key', 'part'):
        assert secret not in err, err
    t.config(success_url=web.url.replace('//', '//me:pw@') + '/uuid')
    err = t.backup('-vv').err
    assert web.url + ': told' in err and 'me:pw' not in err and 'uuid' not in err, err


def test_success_url_over_tls(t):
    fill(t, {'INBOX': few(1)})
    web = servers.Web(certificate=t.certs.make('rsa'))
    t.cleanups.append(web.stop)
    t.config(success_url=web.url + '/ok', ca_file=t.certs.ca)
    t.backup()
    assert web.requests == ['/ok'], web.requests
    account = t.account(tls_fingerprint=t.certs.fingerprint())
    del account['ca_file']
    t.config(account, success_url=web.url + '/ok', ca_file=t.certs.authority('other'))
    assert 'warning' in t.backup().err
    assert web.requests == ['/ok'], web.requests


def test_a_signal_ends_the_run_cleanly(t):
    fill(t, {'INBOX': few(5), 'B': [m for m in few(300, 'b')]})
    t.config(email_batch_size=1, retries=0)
    process = subprocess.Popen([PROGRAM, t.path], stderr=subprocess.PIPE)
    while not os.path.exists(t.mbox('B')):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1].decode()
    if process.returncode == 1:
        assert 'stopped' in err, err
    t.backup()
    t.same(t.held())


def test_a_killed_worker_costs_only_its_mailbox(t):
    fill(t, {'B%d' % i: few(60, 'k%d' % i) for i in range(4)})
    t.config(email_batch_size=1)
    process = subprocess.Popen([PROGRAM, '-v', t.path], stderr=subprocess.PIPE)
    killed = False
    while process.poll() is None and not killed:
        workers = children(process.pid)
        if len(workers) > 1:
            os.kill(workers[0], signal.SIGKILL)
            killed = True
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0, err
    t.same(t.held())


def test_the_parent_killed_takes_its_workers_along(t):
    fill(t, {'B%d' % i: few(60, 'p%d' % i) for i in range(4)})
    t.config(email_batch_size=1)
    process = subprocess.Popen([PROGRAM, t.path], stderr=subprocess.DEVNULL)
    time.sleep(0.05)
    process.kill()
    process.wait()
    for _ in range(100):
        got = t.run()
        if got.status != 3:
            break
        time.sleep(0.05)
    assert got.status == 0, got.err
    t.same(t.held())


def test_a_mailbox_that_left_the_server(t):
    fill(t, {'INBOX': few(2), 'Old': few(2)})
    t.config()
    t.backup()
    before = archive.digests(t.dest)
    t.imap().delete('Old')
    got = t.backup()
    assert 'Old.mbox' in got.err and archive.digests(t.dest) == before, got.err


def test_half_of_the_mails_gone_is_a_warning(t):
    fill(t, {'INBOX': few(110)})
    t.config()
    t.backup()
    imap = t.imap()
    delete(imap, '1:60')
    got = t.backup('-q')
    assert 'warning' in got.err and '60 of 110' in got.err, got.err


def test_require_mount(t):
    web = servers.Web()
    t.cleanups.append(web.stop)
    t.config(require_mount=True, destination='/', failure_url=web.url + '/bad')
    assert 'mounted' in t.backup(status=1).err
    assert web.requests == ['/bad']
    # A destination that has to be made: what is above it tells.
    t.config(require_mount=True, destination='/nowhere/at/all')
    assert 'no volume is mounted there' in t.backup(status=1).err and not os.path.exists('/nowhere')
    if os.stat('/dev/shm').st_dev != os.stat('/').st_dev:
        t.dest = os.path.join(tempfile.mkdtemp(dir='/dev/shm'), 'new', 'mail')
        t.cleanups.append(lambda: shutil.rmtree(t.dest.partition('/new')[0]))
        held = fill(t, {'INBOX': few(1)})
        t.config(require_mount=True)
        t.backup('--check')
        t.backup()
        t.same(held)


def quick(t, *more, host='localhost', port=None):
    """The quick form's options. The server knows --user as it is."""
    t.email = t.user
    return ['--host', host, '--user', t.user, '--to', t.dest, '--port', str(port or t.dovecot().tls), *more]


def test_quick_form(t):
    """Without a configuration; then with the lines that it printed."""
    held = fill(t, {'INBOX': few(3), 'A/B': few(2)})
    env = {'SSL_CERT_FILE': t.certs.ca}
    options = quick(t, '--password-command', 'echo ' + servers.PASSWORD)
    got = t.backup('--list', *options, config=False, env=env)
    assert re.search(r'INBOX +3 ', got.out) and '"destination"' not in got.err, got
    got = t.backup('-m', 'INBOX', *options, config=False, env=env)
    assert ': 3 new' in got.err, got.err
    with open(t.path, 'w') as f:
        f.write(got.err[got.err.index('\n{') + 1:])
    got = t.backup(env=env)
    assert ': 2 new' in got.err, got.err
    t.same(held)
    got = t.backup('-q', *quick(t), config=False, env=dict(env, IMAP_BACKUP_PASSWORD=servers.PASSWORD))
    assert got.err == '', got.err
    assert 'do not go together' in t.backup(*options, status=2).err.replace('does not', 'do not')
    assert servers.PASSWORD not in got.err


def test_a_password_in_the_environment_does_not_stay_there(t):
    with socket.create_server(('127.0.0.1', 0)) as listener:   # and says nothing
        process = subprocess.Popen([PROGRAM, *quick(t, port=listener.getsockname()[1], host='127.0.0.1')],
                                   env=dict(os.environ, IMAP_BACKUP_PASSWORD='wiped-away', SSL_CERT_FILE=t.certs.ca),
                                   stderr=subprocess.PIPE, cwd=t.folder)
        line = listener.accept()[0]
        pids = [process.pid] + children(process.pid)
        for pid in pids:
            with open('/proc/%d/environ' % pid, 'rb') as f:
                environ = f.read()
            assert b'SSL_CERT_FILE' in environ and b'wiped-away' not in environ, environ
        assert len(pids) > 1
        process.send_signal(signal.SIGTERM)
        line.close()
        err = process.communicate(timeout=60)[1]
    assert b'wiped-away' not in err, err


def at_a_terminal(t, answer, *options, config=True):
    """Run at a terminal of its own, and answer the question. (status, what was shown, echo meanwhile, echo after)"""
    master, slave = os.openpty()
    t.cleanups.append(lambda: os.close(master))

    def own():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell's background job ignores it, and so would we

    def echo():
        return bool(termios.tcgetattr(slave)[3] & termios.ECHO)

    process = subprocess.Popen([PROGRAM, *options, *([t.path] if config else [])], stdin=slave, stdout=slave, stderr=slave,
                               cwd=t.folder, preexec_fn=own, env=dict(os.environ, SSL_CERT_FILE=t.certs.ca))
    shown = b''
    while b'password of ' + t.email.encode() + b': ' not in shown:
        shown += os.read(master, 1000)
    asked = echo()
    if isinstance(answer, bytes):
        os.write(master, answer)
    else:
        process.send_signal(answer)
    status = process.wait(timeout=60)
    after = echo()
    os.close(slave)
    try:
        while chunk := os.read(master, 1000):
            shown += chunk
    except OSError:   # EIO: nobody has it open any more
        pass
    return status, shown.decode(), asked, after


def test_a_password_is_asked_on_a_terminal(t):
    held = fill(t, {'INBOX': few(3)})
    account = t.account()
    del account['password']
    t.config(account)
    status, shown, asked, after = at_a_terminal(t, servers.PASSWORD.encode() + b'\n')
    assert status == 0 and not asked and after and servers.PASSWORD not in shown, (status, shown, asked, after)
    t.same(held)
    status, shown, asked, after = at_a_terminal(t, b'\0' + servers.PASSWORD.encode() + b'\n')   # Ctrl-@ ends no line
    assert status == 1 and 'no password' in shown and servers.PASSWORD not in shown, (status, shown)
    # Ctrl-C, and a signal from elsewhere: the terminal is as it was, and nothing more is asked.
    t.config(account, dict(account, email='b@example.org'), start_url='http://127.0.0.1:1/',
             failure_url='http://127.0.0.1:1/')
    for answer in (b'\x03', signal.SIGTERM):
        status, shown, asked, after = at_a_terminal(t, answer)
        assert '127.0.0.1' not in shown and 'b@example' not in shown, shown
        assert status == 1 and not asked and after and 'stopped by a signal' in shown, (status, shown, asked, after)
        assert re.search(r'password of [^\r\n]*\r?\n.*stopped', shown, re.S), shown   # on a line of its own
    t.config(account)
    status, shown, asked, after = at_a_terminal(t, b'\x04')
    assert status == 1 and after and 'expected one of "password", "password_command"' in shown, shown
    assert re.search(r'password of [^\r\n]*\r?\n.*error: ', shown, re.S), shown
    status, shown, asked, after = at_a_terminal(t, servers.PASSWORD.encode() + b'\n', *quick(t), config=False)
    assert status == 0 and not asked and servers.PASSWORD not in shown, (status, shown)
    # Without a terminal nobody is asked.
    got = subprocess.run([PROGRAM, t.path], stderr=subprocess.PIPE, start_new_session=True)
    assert got.returncode == 1 and b'expected one of "password", "password_command" and "oauth2"' in got.stderr, got
    got = subprocess.run([PROGRAM, *quick(t)], stderr=subprocess.PIPE, start_new_session=True, cwd=t.folder)
    assert got.returncode == 1 and b'IMAP_BACKUP_PASSWORD or --password-command' in got.stderr, got


def test_nothing_goes_in_the_clear_with_a_fingerprint(t):
    server = t.dovecot('clear', starttls=False)
    fill(t, {'INBOX': few(1)}, server)
    t.config(t.account(server, mode='plain', ssl=False, host='127.0.0.1'))
    t.backup()
    t.config(t.account(server, mode='plain', ssl=False, host='127.0.0.1', tls_fingerprint='00' * 32))
    assert 'offers no STARTTLS' in t.backup(status=1).err


def test_signals_that_are_ignored_stay_so(t):
    """As nohup wants it."""
    fill(t, {'INBOX': few(300)})
    t.config(email_batch_size=1)
    process = subprocess.Popen(['sh', '-c', 'trap "" HUP; exec "$0" "$@"', PROGRAM, t.path], stderr=subprocess.PIPE)
    while not os.path.exists(t.mbox()):
        time.sleep(0.001)
    process.send_signal(signal.SIGHUP)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0 and 'stopped' not in err, err


def test_memory_does_not_grow_with_a_mail(t):
    """What a worker needs above --version, with a mail of 50 MB and with 30,000 mails."""
    big = sample.Mail(b'Message-ID: <big@x>\r\n\r\n' + b'x' * 76 * 1000 + b'\r\n' + (b'A' * 76 + b'\r\n') * 640000,
                      '', sample.T0)
    sample.fill_maildir(t.dovecot().maildir(t.user), [big])
    sample.fill_maildir(t.dovecot().maildir(t.user, 'Many'), sample.many(30000))
    t.dovecot().own(t.dovecot().home(t.user))
    t.config()

    def peak(*command):
        """The largest resident set, in KiB, of the program and its children, as the kernel counted."""
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = {}
        while process.poll() is None:
            for pid in [process.pid] + children(process.pid):
                try:
                    with open('/proc/%d/status' % pid) as f:
                        m = re.search(r'VmHWM:\s*(\d+)', f.read())
                    if m and os.readlink('/proc/%d/exe' % pid) == os.path.realpath(PROGRAM):
                        seen[pid] = int(m.group(1))
                except OSError:
                    pass
            time.sleep(0.002)
        assert process.returncode == 0
        return seen.pop(process.pid, 0), max(seen.values(), default=0)

    base = max(int(subprocess.run(['/bin/sh', '-c', '"$0" --version >/dev/null; grep VmHWM /proc/self/status',
                                   PROGRAM], stdout=subprocess.PIPE).stdout.split()[1]), 1)
    parent, worker = peak(PROGRAM, t.path)
    print('peak resident set: parent %d KiB, worker %d KiB' % (parent, worker))
    assert 0 < worker - base < 2048 + parent + 30000 * 24 / 1024, (base, parent, worker)
    assert worker <= parent + 2048 + 30000 * 24 // 1024, (parent, worker)
