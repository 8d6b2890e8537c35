"""What a run says, and how its processes and commands end."""
import base64
import fcntl
import glob
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
import unicodedata

import archive
import imapd
import sample
import servers
from run import HERE, PROGRAM, Skip, children, memory
from test_backup import at_a_terminal as type_in
from test_backup import quick


def mails(n, label='m'):
    return [b'Message-ID: <%s%d@x>\r\n\r\nbody\r\n' % (label.encode(), i) for i in range(n)]


def serve(t, boxes, session=imapd.Session, **config):
    server = imapd.Server(boxes, session=session)
    t.cleanups.append(server.stop)
    t.config(t.account(server, 'plain'), **config)
    return server


def summary(text):
    return next(line for line in text.splitlines() if 'without news' in line)


def test_duplicates_are_told_once(t):
    box = imapd.Mailbox(mails(2) + mails(2))
    serve(t, {'INBOX': box, 'Other': imapd.Mailbox(mails(1))})
    assert '2 duplicates left out' in t.backup().err
    assert 'left out' not in t.backup().err
    assert '2 duplicates left out' in t.backup('-v').err
    box.add(mails(1)[0])
    assert ' 1 duplicate left out' in t.backup().err


def test_a_full_disk_is_one_line(t):
    library = os.path.join(t.folder, 'faults.so')
    subprocess.run([os.environ.get('CC', 'cc'), '-shared', '-fPIC', '-o', library,
                    os.path.join(HERE, 'faults.c')], check=True)
    count = os.path.join(t.folder, 'count')
    serve(t, {name: imapd.Mailbox(mails(5, name)) for name in ('INBOX', 'a', 'b', 'c', 'd')})
    for error, words, places in (('ENOSPC', 'No space left', range(5, 40)), ('EDQUOT', 'quota', (3, 12, 25))):
        for at in places:
            with open(count, 'wb') as f:
                f.write(bytes(8))
            got = t.backup(status=1, env={'LD_PRELOAD': library, 'FAULTS_UNDER': t.dest, 'FAULTS_COUNT': count,
                                          'FAULTS_AT': str(at), 'FAULTS_DO': error, 'FAULTS_EVER': '1'})
            lines = [line for line in got.err.splitlines() if 'error:' in line]
            assert len(lines) == 1 and words in lines[0], got.err
            new = sum(len(archive.read(path)) for path in glob.glob(t.archive() + '/*.mbox'))
            assert ' %d new,' % new in summary(got.err), (new, got.err)
            subprocess.run(['rm', '-rf', t.dest], check=True)


def test_what_came_back_before_the_line_broke_is_counted(t):
    class Breaks(imapd.Session):
        def fetch_mail(self, number, m, items):
            if m.uid == 4 and 'BODY[]' in str(items).replace('.PEEK', '') and not hasattr(self.server, 'broke'):
                self.server.broke = True
                self.drop('rst')
            super().fetch_mail(number, m, items)
    box = imapd.Mailbox(mails(2))
    serve(t, {'INBOX': box}, Breaks)
    t.backup()
    box.expunge(2)
    assert ' 1 gone,' in summary(t.backup().err)
    box.add(mails(2)[1])
    box.add(mails(1, 'new')[0])
    got = t.backup()
    assert 'trying again' in got.err and ' 1 new, 0 gone, 1 back,' in summary(got.err), got.err


def test_another_run_is_no_error(t):
    serve(t, {'INBOX': imapd.Mailbox(mails(1))})
    t.backup()
    with open(os.path.join(t.archive(), '.lock'), 'r+') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        got = t.backup('-q', status=3)
        assert got.err == '', got.err
    with open(t.mbox(), 'r+b') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        for args in [], ['--verify'], ['--export-all']:
            got = t.backup('-q', *args, status=3 if args else 0)   # without news it is not opened
            assert got.err == '', got.err


def test_a_dry_run_tells_octets_and_room(t):
    serve(t, {'INBOX': imapd.Mailbox(mails(3))})
    got = t.backup('-n')
    octets = sum(map(len, mails(3)))
    assert '3 would be fetched' in summary(got.err) and '%d B' % octets in summary(got.err), got.err
    assert re.search(r'can be made, [\d.]+ [kMGTP]B free', got.err), got.err
    t.backup()
    with open(t.mbox(), 'ab') as f:   # as a run that was killed leaves it
        f.write(b'From nobody Thu Jan  1 00:00:00 1970\nX-Half: ')
    before = os.stat(t.mbox()).st_size
    got = t.backup('-n')   # what such an archive lacks it cannot tell
    assert 'the next backup makes it anew' in got.err and 'trying again' not in got.err, got.err
    assert 'removed' not in got.err and 'cut off' not in got.err and 'unfinished' not in got.err, got.err
    assert os.stat(t.mbox()).st_size == before
    assert re.search(r'can be written, [\d.]+ [kMGTP]B free', got.err), got.err


def stopped(t, ready, group=False, how=(signal.SIGTERM,)):
    """Start the program, and signal it once it is ready(). Returns what it said."""
    process = subprocess.Popen([*t.program, t.path], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               start_new_session=True)
    while not ready() and process.poll() is None:
        time.sleep(.02)
    for number in how:
        (os.killpg if group else os.kill)(process.pid, number)
        time.sleep(.05)
    return process.communicate(timeout=60)[1].decode(), process.returncode


def slow_box(t, **config):
    """A server that gives its first mails at once, and waits a long time before the next."""
    class Slow(imapd.Session):
        def fetch_mail(self, number, m, items):
            if m.uid > 4 and any('BODY' in str(i) for i in items):
                self.flush()
                self.server.slow = True
                time.sleep(2)
            super().fetch_mail(number, m, items)
    return serve(t, {'INBOX': imapd.Mailbox(mails(9))}, Slow, email_batch_size=2, **config)


def test_no_number_of_signals_loses_mails(t):
    """Also when the whole group gets them, over and over."""
    for group in False, True:
        for how in ([signal.SIGTERM] * 5, [signal.SIGINT] * 3, [signal.SIGHUP, signal.SIGTERM, signal.SIGINT] * 2):
            subprocess.run(['rm', '-rf', t.dest], check=True)
            server = slow_box(t)   # a new one, whose sessions are all of this run
            server.slow = False
            err, status = stopped(t, lambda: server.slow, group, how)
            new = int(re.search(r'(\d+) new', summary(err)).group(1))
            assert status == 1 and 'NOT WHOLE' in summary(err) and 'stopped by a signal' in err, err
            assert len(archive.read(t.mbox())) == new > 0, err


def test_a_signal_ends_a_url_that_stalls(t):
    web = servers.Web(delay=60)
    t.cleanups.append(web.stop)
    for key in 'start_url', 'success_url':
        web.requests.clear()
        serve(t, {'INBOX': imapd.Mailbox(mails(1))}, **{key: web.url + '/x'})
        began = time.monotonic()
        err, status = stopped(t, lambda: web.requests)
        assert time.monotonic() - began < 20 and web.requests == ['/x'], err
        assert status == (key == 'start_url') and web.url + ': the request was broken off' in err, err


def test_a_signal_ends_a_lookup(t):
    """Of a name, where no name server answers."""
    mark, source, library = (os.path.join(t.folder, x) for x in ('mark', 'slow.c', 'slow.so'))
    with open(source, 'w') as f:
        f.write('#include <netdb.h>\n#include <unistd.h>\nint getaddrinfo(const char *name, const char *service, '
                'const struct addrinfo *hints, struct addrinfo **list) {\n\tif (symlink("x", "%s") != 0) return 1;\n'
                '\tfor (int i = 0; i < 200; i++) usleep(100000);\n\treturn EAI_AGAIN;\n}\n' % mark)
    subprocess.run([os.environ.get('CC', 'cc'), '-w', '-shared', '-fPIC', '-o', library, source], check=True)
    serve(t, {'INBOX': imapd.Mailbox(mails(1))})
    t.program = ['env', 'LD_PRELOAD=' + library, *t.program]
    began = time.monotonic()
    err, status = stopped(t, lambda: os.path.lexists(mark))
    assert time.monotonic() - began < 15 and status == 1 and 'stopped by a signal' in err and 'died' not in err, err


def test_a_process_that_cannot_be_started(t):
    """It is tried "retries" times."""
    if os.geteuid() != 0:
        raise Skip('wants root, to become a user that may have no process more')
    serve(t, {'INBOX': imapd.Mailbox(mails(1))}, destination='/nowhere', retries=1)
    os.chmod(t.folder, 0o755)
    os.chmod(t.path, 0o644)
    program = os.path.join(t.folder, 'program')
    subprocess.run(['cp', PROGRAM, program], check=True)

    def limit(n=1):
        os.setgid(64321)
        os.setuid(64321)
        resource.setrlimit(resource.RLIMIT_NPROC, (n, n))
    done = subprocess.run([program, t.path], preexec_fn=limit, stderr=subprocess.PIPE, timeout=60, cwd='/')
    err = done.stderr.decode()
    assert done.returncode == 1 and err.count('cannot start a process') == 2 and 'error: ' + t.email in err, err
    with open(t.path) as f:
        config = json.load(f)
    config['accounts'][0]['password_command'] = 'echo ' + config['accounts'][0].pop('password')
    t.config(*config['accounts'], destination='/tmp', retries=2)
    os.chmod(t.path, 0o644)
    # A third process of this user, for a while.
    other = subprocess.Popen(['sleep', '1.5'], preexec_fn=lambda: limit(3))
    threading.Thread(target=other.wait).start()
    done = subprocess.run([program, '-n', t.path], preexec_fn=lambda: limit(3), stderr=subprocess.PIPE,
                          timeout=60, cwd='/')
    assert done.returncode == 0, done.stderr.decode()


def at_a_terminal(t, columns=80):
    """Run with a terminal as stderr. Returns what it shows, as it draws it."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 25, columns, 0, 0))
    process = subprocess.Popen([*t.program, t.path], stderr=slave, stdin=subprocess.DEVNULL)
    os.close(slave)
    shown = b''
    try:
        while chunk := os.read(master, 10000):
            shown += chunk
    except OSError:   # EIO: nobody has it open any more
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode().split('\r\x1b[K')


def columns(text):
    return sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in text)


def test_wide_characters_in_the_progress_line(t):
    class Slow(imapd.Session):
        def cmd_UID_FETCH(self, tag, args):
            self.flush()
            time.sleep(.3)
            return super().cmd_UID_FETCH(tag, args)
    name = '\u65e5\u672c\u8a9e\u306e\u30e1\u30fc\u30eb' * 6
    serve(t, {'INBOX': imapd.Mailbox(), sample.mutf7(name): imapd.Mailbox(mails(9))}, Slow, email_batch_size=3)
    drawn = [line for line in at_a_terminal(t) if re.search(r'\d mails ', line)]
    assert any(name[:4] in line for line in drawn), drawn
    for line in drawn:
        assert columns(line) < 80, line


def test_the_progress_line_goes_on_after_a_reconnection(t):
    """What was counted stays counted, and the rate is one of this line."""
    class Cut(imapd.Session):
        def setup(self):
            if not hasattr(self.server, 'was_cut'):
                self.server.was_cut = True
                self.cut = (1500000, 'rst')

        def cmd_UID_FETCH(self, tag, args):
            time.sleep(.15)
            return super().cmd_UID_FETCH(tag, args)
    serve(t, {'INBOX': imapd.Mailbox(m + (b'x' * 70 + b'\r\n') * 2000 for m in mails(30))}, Cut, email_batch_size=1)
    lines = at_a_terminal(t, columns=200)
    again = next(i for i, line in enumerate(lines) if 'trying again' in line)
    drawn = [(i, re.match(r'(?:(\d+)% )?(\d+) mails ([\d.]+ [kM]?B)(?: [\d.]+ [kM]?B/s)?(?: \d+:\d\d left)? ', line))
             for i, line in enumerate(lines) if re.search(r'\d mails ', line)]
    assert all(m for _, m in drawn), lines
    assert sum(t.email + ' INBOX' in line for line in lines) > 5, lines
    counts = [int(m.group(2)) for _, m in drawn]
    assert counts == sorted(counts) and counts[-1] > 20, counts
    assert all(int(m.group(1) or 0) <= 100 for _, m in drawn), lines
    assert any(i < again and int(m.group(2)) > 0 for i, m in drawn) and any(i > again for i, _ in drawn), lines


def test_list_fits_the_screen(t):
    """Also with names that are ignored; and columns are of the screen, not of octets or characters."""
    long, ignored = 'A name that is longer than its column', 'x' * 75
    serve(t, {'INBOX': imapd.Mailbox(mails(3)), 'Work/Invoices 2024': imapd.Mailbox(mails(1)),
              long: imapd.Mailbox(mails(2)), sample.mutf7('Entwürfe \u4e2d'): imapd.Mailbox(),
              ignored: imapd.Mailbox(), sample.mutf7('Ämter'): imapd.Mailbox()}, ignore_mailboxes=['x*', 'Ä*'])
    got = t.backup('--list')
    assert all(len(line) <= 80 for line in got.out.splitlines()), got.out
    assert re.search(r'INBOX +3 .* never +INBOX.mbox', got.out) and long in got.out, got.out
    assert re.search(r'(?m)^  Ämter {18}\(ignored\)$', got.out) and ignored + '\n' in got.out, got.out
    assert len({columns(line[:line.index('never')]) for line in got.out.splitlines() if 'never' in line}) == 1, got.out


def test_list_works_offline(t):
    """A name that was cut is in the index; -m narrows; with --json it is the same."""
    long = 'Lists/' + 'x' * 150
    server = serve(t, {'INBOX': imapd.Mailbox(mails(3)), 'a/b': imapd.Mailbox(mails(2)), long: imapd.Mailbox(mails(1))})
    t.backup()
    server.stop()
    t.config(dict(t.account(server, 'plain'), password_command='exit 1'))
    with open(t.path) as f:
        text = re.sub(r'"password": "[^"]*",?', '', f.read())
    with open(t.path, 'w') as f:
        f.write(text)
    got = t.backup('--list', '-n')
    assert re.search(r'INBOX +- +- +3 +0  20\d\d-\d\d-\d\d INBOX.mbox', got.out), got
    assert re.search(r'a/b +- +- +2 +0 ', got.out) and long + '\n' in got.out, got
    with open(t.mbox(), 'r+') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)   # a backup that goes on meanwhile is in nobody's way
        said = json.loads(t.backup('--list', '-n', '--json').out)
        assert {b['name']: b['archived'] for b in said['accounts'][0]['boxes']} == {'INBOX': 3, 'a/b': 2, long: 1}, said
    got = t.backup('--list', '-n', '-m', 'a/*')
    assert 'a/b' in got.out and 'INBOX' not in got.out, got


def test_check_tries_once_and_the_destination_too(t):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        t.config({'email': t.email, 'host': '127.0.0.1', 'port': s.getsockname()[1], 'password': 'x', 'ssl': False},
                 retries=5)
        began = time.monotonic()
        got = t.backup('--check', status=1)
        assert 'trying again' not in got.err and time.monotonic() - began < 60, got.err
    server = serve(t, {'INBOX': imapd.Mailbox()})
    assert re.search(r'backup: can be made, [\d.]+ [kMGTP]B free', t.backup('--check').out)
    t.backup()
    assert re.search(r'backup: can be written, ', t.backup('--check').out)
    t.config(t.account(server, 'plain'), destination=os.path.join(t.path, 'x'))
    got = t.backup('--check', status=1)
    assert 'Not a directory' in got.err and 'login works' in got.out, got


def test_a_silent_port_may_want_tls(t):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(5)
        t.config({'email': t.email, 'host': '127.0.0.1', 'port': s.getsockname()[1], 'password': 'x'},
                 retries=0, timeout=12)
        got = t.backup('-q', status=1)
        assert 'perhaps it wants "ssl": true' in got.err, got.err


def command(t, text, **config):
    server = imapd.Server({'INBOX': imapd.Mailbox(mails(1))})
    t.cleanups.append(server.stop)
    account = t.account(server, 'plain')
    word = account.pop('password')
    t.config(dict(account, password_command=text.replace('WORD', word)), **config)


def test_password_commands(t):
    for text in ("echo WORD; echo other", "printf 'WORD\\r\\nother'", "printf WORD; seq 100000 >&2",
                 "echo WORD; seq 30000", "sleep 30 2> /dev/null & echo WORD", "yes | head -n 1 > /dev/null; echo WORD",
                 # SIGPIPE is as usual.
                 "(yes; echo $? > code) | head -n 1 > rest; test $(cat code) = 141 && echo WORD"):
        command(t, text)
        got = t.backup()
        assert '1 mailboxes' in got.err, (text, got.err)
    for text, words in (('exit 3', 'failed'), ('true', 'printed nothing'), ("printf '\\nWORD'", 'printed nothing'),
                        ('echo WORD; kill -9 $$', 'failed'), ('echo WORD; sleep 60', 'within 1 second'),
                        ('echo WORD; exec >&-; sleep 60', 'within 1 second')):
        command(t, text, timeout=1)
        got = t.backup(status=1)
        assert '"password_command"' in got.err and words in got.err, (text, got.err)


def test_a_password_command_ends_with_the_run(t):
    mark = os.path.join(t.folder, 'mark')
    command(t, 'echo $$ > %s; sleep 100; echo' % mark, timeout=60)
    err, status = stopped(t, lambda: os.path.exists(mark) and os.stat(mark).st_size > 0)
    assert status == 1 and 'did not end' not in err and 'NOT WHOLE' in err, err
    with open(mark) as f:
        assert not os.path.exists('/proc/%s' % f.read().strip())


def test_children_are_waited_for_whatever_was_ignored(t):
    """Some programs that start others leave SIGCHLD ignored; then nobody could be waited for."""
    command(t, 'echo WORD', timeout=5)
    done = subprocess.run([*t.program, t.path], stderr=subprocess.PIPE, timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert done.returncode == 0, done.stderr.decode()


def test_what_a_password_command_leaves_behind_holds_nothing_up(t):
    """Such as an agent that keeps the key."""
    mark = os.path.join(t.folder, 'mark')
    command(t, 'sleep 20 > /dev/null 2>&1 & echo $! > %s; echo WORD' % mark)
    t.backup()
    with open(mark) as f:
        pid = int(f.read())
    with open('/proc/%d/stat' % pid) as f:
        assert f.read().split(')')[1].split()[0] != 'Z'   # it is still at it
    os.kill(pid, signal.SIGKILL)


def test_others_at_the_folder(t):
    serve(t, {'INBOX': imapd.Mailbox(mails(1))})
    t.backup()
    os.chmod(t.archive(), 0o777)
    assert 'chmod go-w' in t.backup().err
    if os.geteuid() == 0:
        os.chown(t.archive(), 12345, -1)
        assert 'belongs to another user (12345)' in t.backup(status=1).err


def test_a_destination_is_made_with_its_parents(t):
    t.dest = os.path.join(t.folder, 'a', 'b', 'c')
    serve(t, {'INBOX': imapd.Mailbox(mails(1))})
    assert 'c: can be made' in t.backup('--check').out
    t.backup()
    assert os.path.exists(t.mbox()) and os.stat(os.path.join(t.folder, 'a')).st_mode & 0o777 == 0o700


def test_too_many_long_names(t):
    """What has room is backed up; the rest is a failure that says so."""
    class Long(imapd.Session):
        def cmd_LIST(self, tag, args):
            for i in range(20000):
                name = b'"%05d%s"' % (i, b'x' * 890) if i > 0 else b'INBOX'
                self.put(b'* LIST () "/" %s\r\n* STATUS %s (MESSAGES 1)\r\n' % (name, name))
            self.ok(tag)
    serve(t, {'INBOX': imapd.Mailbox(mails(1))}, Long)
    got = t.backup('-m', 'INBOX', status=1)
    assert 'octets of their names' in got.err and '1 new' in summary(got.err), got.err


def test_a_core_dump_holds_no_password(t):
    """Neither of a worker at work nor of the parent, in any form, wherever the password came from."""
    word, other = 'a-word-"of-our-own', 'a-word-of-others'
    seen = []

    class Plainly(imapd.Session):
        login = ''

    def hook(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY.PEEK[]' in args and not seen:
            for pid in children(os.getpid()):
                with open('/proc/%d/cmdline' % pid) as f:
                    if PROGRAM in f.read():
                        seen.extend(memory(x) for x in [pid, *children(pid)])

    env = dict(os.environ, SSL_CERT_FILE=t.certs.ca)
    for session in imapd.Session, Plainly:
        server = imapd.Server({'INBOX': imapd.Mailbox(mails(3))}, session=session, hook=hook, password=word,
                              certificate=t.certs.good, tls=True)
        t.cleanups.append(server.stop)
        for source in 'file', 'command', 'environment', 'terminal':
            shutil.rmtree(t.dest, ignore_errors=True)
            seen.clear()
            account, options = t.account(server, password=word), [t.path]
            if source != 'file':
                del account['password']
            if source == 'command':
                account['password_command'] = "printf 'a-word-\\042of-our-own'"
            if source == 'environment':
                options = quick(t, port=server.port)
            t.config(account, dict(t.account(server), email='other@x', password=other), total_processes=1)
            if source == 'terminal':
                type_in(t, word.encode() + b'\n')
            else:
                subprocess.run([PROGRAM, *options], stderr=subprocess.PIPE, timeout=60,
                               env=dict(env, IMAP_BACKUP_PASSWORD=word) if source == 'environment' else env)
            assert os.path.exists(t.mbox()) and len(seen) > 1, source
            for form in (other, word, word.replace('"', '\\"'),
                         *(base64.b64encode(word[i:].encode()).decode()[4:-4] for i in range(3))):
                for i, memo in enumerate(seen):
                    assert form.encode() not in memo, (session, source, i, form)


def test_an_output_that_is_full_is_told(t):
    serve(t, {'INBOX': imapd.Mailbox(mails(1))})
    t.backup()
    for words in '--list', '--list -n', '--verify', '--check', '--json', '--export-all', '--help', '-V':
        options = words.split()
        with open('/dev/full', 'wb') as full:
            got = subprocess.run([PROGRAM, *options, t.path], stdout=full, stderr=subprocess.PIPE, text=True)
        assert got.returncode == 1 and got.stderr.count('error: standard output: No space left') == 1, (options, got)


def test_archived_mails_that_vanished_are_told(t):
    """With -q, too: what the server has no more is lost."""
    box = imapd.Mailbox(mails(4))
    serve(t, {'INBOX': box})
    t.backup()
    whole = os.path.getsize(t.mbox())
    for do, lost in (lambda: os.truncate(t.mbox(), whole // 4), 3), (lambda: os.unlink(t.mbox()), 4), (t.backup, 0):
        do()
        got = t.backup('-q')
        assert ('%d of the archived mails are not in the file' % lost in got.err) == (lost > 0), (lost, got.err)
        assert len(archive.read(t.mbox())) == 4 and (got.err == '') == (lost == 0), (lost, got.err)


def test_what_is_no_file_is_told(t):
    serve(t, {'INBOX': imapd.Mailbox(mails(1))})
    os.makedirs(t.archive())
    os.mkfifo(os.path.join(t.archive(), '.lock'))
    assert '.lock: this is not a file' in t.backup(status=1).err
    os.unlink(os.path.join(t.archive(), '.lock'))
    os.mkfifo(t.mbox())
    assert 'INBOX.mbox: this is not a file' in t.backup(status=1).err
    assert 'INBOX.mbox: this is not a file' in t.backup('-n', status=1).err
    os.unlink(t.mbox())
    os.unlink(os.path.join(t.archive(), '.lock'))
    os.rmdir(t.archive())
    os.symlink('nowhere', t.archive())
    got = t.backup(status=1)
    assert 'No such file' in got.err and 'another user' not in got.err, got.err
