"""What comes back out of an archive: verify, export, restore."""
import mailbox
import os
import random
import re
import subprocess

import archive
import sample
import servers
from test_backup import delete, few, fill


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
    for at in [0, 3, 20, 45, 50, 72, whole.index(b'\n\nFrom ') + 1, len(whole) // 2, len(whole) - 3]:
        with open(path, 'wb') as f:
            f.write(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1:])
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
