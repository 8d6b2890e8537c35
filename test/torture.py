#!/usr/bin/env python3
"""Kills, power cuts, disk faults, cut lines and mutating servers, for minutes: torture.py [--seed N] [--minutes N] [PART ...]

Parts: kills cuts tears faults chains lines, and mutate (mutate.py). Each of the others puts an archive through a history (STEPS) and disturbs each step at
every operation that changes the disk, or at every octet of the line; then one more run must make the archive
what the server holds, and another must change no byte. test_torture.py runs a sample of this.
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import archive   # noqa: E402
import imapd     # noqa: E402
import mutate    # noqa: E402
import run       # noqa: E402
import sample    # noqa: E402
import servers   # noqa: E402

PROGRAM = os.environ.get('IMAP_BACKUP', os.path.join(os.path.dirname(HERE), 'imap_backup'))
EMAIL = 'u@example.org'
LEFT_OUT = '.lock'   # holds nothing


# ---- the server's history ----

def copy_box(box):
    """A mailbox as it is now, to be changed apart."""
    new = imapd.Mailbox(uidvalidity=box.uidvalidity)
    new.uidnext, new.modseq = box.uidnext, box.modseq
    new.mails = [imapd.Mail(m.uid, m.data, m.flags, m.when, m.modseq) for m in box.mails]
    return new


def held(box):
    return [archive.Mail(m.uid, m.data, archive.state_of(m.flags), m.when,
                         imapd.header_fields(m.data, 'FROM TO CC DATE SUBJECT')) for m in box.mails]


def first_mails(rng):
    """Ordinary ones, two without a Message-ID whose keys are equal, duplicates, one longer than the
    program's buffer with From lines where its parts meet."""
    same = b'From: a@x\r\nSubject: same\r\n\r\n'
    twice = sample.Mail(b'Message-ID: <twice@x>\r\n\r\ntwo of these\r\n', '\\Seen', sample.T0)
    big = sample.mail(rng, 'big', '', '\\Flagged')
    body = b''.join(b'From %d x\r\n\r\nFrom y\r\n' % n + b'.' * (n % 900) + b'\r\n' for n in range(400))
    return [sample.mail(rng, 'one', flags='\\Seen'), sample.Mail(same + b'1\r\n', '', 5),
            sample.mail(rng, 'two', flags=''), sample.Mail(same + b'2\r\n', '\\Seen', 6),
            sample.Mail(big.data + body, big.flags, big.when), twice,
            sample.mail(rng, 'three', flags='\\Answered'), twice, sample.mail(rng, 'no line end', 'x', '')]


def then_changed(rng, box):
    """New mails, gone ones, other flags, another duplicate."""
    gone = [m.uid for m in box.mails if archive.own_id(m.data)][::3]
    box.expunge(*gone)
    for m in box.mails[::2]:
        box.flag(m.uid, '\\Seen \\Flagged' if '\\Flagged' not in m.flags else '')
    for n in range(3):
        m = sample.mail(rng, 'new %d' % rng.getrandbits(30), message_id=n != 1)
        box.add(m.data, m.flags, m.when)
    box.add(sample.with_attachment(rng, 'large %d' % rng.getrandbits(30), 50_000).data)
    return box


def then_wavers(before, box):
    """What a step did to flags and mails is taken back: flags as before, gone mails are there again, with
    new UIDs and other flags."""
    new = copy_box(box)
    for m in before.mails:
        if any(n.uid == m.uid for n in new.mails):
            if new.mail(m.uid).flags != m.flags:
                new.flag(m.uid, ' '.join(m.flags))
        elif not any(n.data == m.data for n in new.mails):
            new.add(m.data, '' if m.flags else '\\Answered', m.when)
    return new


def then_renumbered(rng, box):
    box.renumber()
    box.expunge([m.uid for m in box.mails if archive.own_id(m.data)][1])
    box.flag(box.mails[0].uid, '$Forwarded')
    m = sample.mail(rng, 'renumbered')
    box.add(m.data, m.flags, m.when)
    return box


def apart(box, name, few):
    """A mailbox as it is under one of several names: no mail or UID is the same in two of them. few: only
    some of its mails, and little of each."""
    new = copy_box(box)
    new.uidnext += len(name)
    new.mails = new.mails[-2:] if few else new.mails
    for m in new.mails:
        m.uid += len(name)
        if few:
            m.data = b'Message-ID: %s\r\n\r\n%s' % (archive.own_id(m.data) or b'%d@x' % len(m.data), m.data[-9:])
        m.data = b'Subject: %s\r\n%s' % (name.encode(), m.data)
    return new


class Plain(imapd.Session):
    capabilities = imapd.BARE


def whole_of(stored):
    """A stored mail's text without the Message-ID that was made for it."""
    made = re.match(rb'Message-ID: <[0-9a-f]{40}(\.\d+)?@imap_backup\.py\.local>\n', stored.text)
    return stored.text[made.end():] if made else stored.text


# ---- the disk ----

def tree(folder):
    """{path: octets, or None for a folder} of all that lies below."""
    out = {}
    for base, folders, files in os.walk(folder):
        out.update((os.path.relpath(os.path.join(base, f), folder), None) for f in folders)
        for f in files:
            if f != LEFT_OUT:
                with open(os.path.join(base, f), 'rb') as file:
                    out[os.path.relpath(os.path.join(base, f), folder)] = file.read()
    return out


def plant(folder, files):
    """Make a folder what tree() told."""
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder, 0o700)
    for path, octets in sorted(files.items()):
        path = os.path.join(folder, path)
        if octets is None:
            os.mkdir(path, 0o700)
        else:
            with open(path, 'wb') as f:
                f.write(octets)


class Inode:
    def __init__(self, octets=b''):
        self.versions = [octets]   # the first is what is on the disk for certain; the last what programs see

    def change(self, octets):
        self.versions.append(octets)


class Disk:
    """What a power cut may leave, from the operations logged: of a file, for each sector any state that
    it had since the last sync; of the folders, any first part of what was not synced."""
    SECTOR = 512

    def __init__(self, root, files):
        self.root = root
        self.sure = {p: o if o is None else Inode(o) for p, o in files.items()}
        self.now, self.pending = dict(self.sure), []

    def name(self, path):
        return os.path.relpath(path, self.root)

    def entry(self, *change):
        """('put', path, inode), ('drop', path) or ('move', path, to): in the folders."""
        self.pending.append(change)
        self.enter(self.now, change)

    @staticmethod
    def enter(entries, change):
        if change[0] == 'put':
            entries[change[1]] = change[2]
        elif change[0] == 'drop':
            entries.pop(change[1], None)
        elif change[1] in entries:
            entries[change[2]] = entries.pop(change[1])

    def apply(self, what, offset, path, octets):
        if what == 'rename':
            self.entry('move', *[self.name(p) for p in path.split('\t')])
            return
        path = self.name(path)
        if os.path.basename(path) == LEFT_OUT:
            return
        if what == 'mkdir':
            self.entry('put', path, None)
        elif what == 'unlink':
            self.entry('drop', path)
        elif what in ('create', 'empty') and path not in self.now:
            self.entry('put', path, Inode())
        elif what == 'sync' and (path == '.' or self.now.get(path, 1) is None):
            here = [c for c in self.pending if os.path.dirname(c[1]) == (path if path != '.' else '')]
            for change in here:
                self.enter(self.sure, change)
                self.pending.remove(change)
        elif path in self.now:
            inode = self.now[path]
            data = inode.versions[-1]
            if what == 'write':
                data = data.ljust(offset, b'\0')
                inode.change(data[:offset] + octets + data[offset + len(octets):])
            elif what in ('truncate', 'empty'):
                inode.change(data[:offset].ljust(offset, b'\0'))
            elif what == 'sync':
                inode.versions = [data]

    def cut(self, how, rng):
        """The power goes. how: none, all, mbox, index (which files' writes came through), or random."""
        entries = dict(self.sure)
        some = {'none': 0, 'random': rng.randint(0, len(self.pending))}.get(how, len(self.pending))
        for change in self.pending[:some]:
            self.enter(entries, change)
        out = {}
        for path, inode in sorted(entries.items()):
            parent = os.path.dirname(path)
            if parent and parent not in out:
                continue
            if inode is None:
                out[path] = None
                continue
            v = inode.versions
            whole = how == 'all' or how == ('mbox' if path.endswith('.mbox') else 'index')
            if how != 'random':
                out[path] = v[-1] if whole else v[0]
                continue
            size, data = len(rng.choice(v)), b''
            likely = rng.choice((0, len(v) - 1))
            for at in range(0, size, self.SECTOR):
                k = rng.choice((likely, likely, 0, len(v) - 1, rng.randrange(len(v))))
                data += v[k][at:at + self.SECTOR].ljust(min(self.SECTOR, size - at), b'\0')
            out[path] = data
        return out


def parse_log(path):
    """[(what, offset, path, octets)]"""
    out = []
    with open(path, 'rb') as f:
        for line in f:
            what, n, offset, name = line.decode().rstrip('\n').split(' ', 3)
            out.append((what, int(offset), name, f.read(int(n))))
    return out


# ---- the program, disturbed ----

class Rig:
    """A scripted server, an account, or several alike; everything they change lies below self.disk."""
    names = ['INBOX']   # of mailboxes, all with the same history
    view = staticmethod(lambda box, name: box)   # what the server holds under such a name
    relays = ()         # in front of the server
    ports = {}          # {account: port}; none: EMAIL, at the server itself

    def __init__(self, session=imapd.Session, **config):
        memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None   # syncs cost nothing there
        self.folder = tempfile.mkdtemp(prefix='ib-torture-', dir=memory)
        self.disk = os.path.join(self.folder, 'disk')
        self.dest = os.path.join(self.disk, 'backup')
        os.mkdir(self.disk)
        self.faults = os.path.join(self.folder, 'faults.so')
        subprocess.run([os.environ.get('CC', 'cc'), '-shared', '-fPIC', '-o', self.faults,
                        os.path.join(HERE, 'faults.c')], check=True)
        self.server = imapd.Server({}, session=session)
        self.config(**config)
        self.known = {}    # every mail that a whole run has archived, by identity
        self.seen = None   # if not None: every mail that a run may have archived
        self.runs = self.disturbed = 0

    def config(self, **more):
        self.path = os.path.join(self.folder, 'config.json')
        with open(self.path, 'w') as f:
            json.dump(dict({'destination': self.dest, 'timeout': 20, 'retries': 1, 'email_batch_size': 3,
                            'total_processes': 64,
                            'header_batch_size': 4, 'ca_file': os.devnull, 'accounts': [
                                {'email': email, 'host': '127.0.0.1', 'port': port, 'password': 'secret',
                                 'ssl': self.server.implicit_tls} for email, port in (
                                     self.ports or {EMAIL: self.server.port}).items()]}, **more), f)
        os.chmod(self.path, 0o600)

    def close(self):
        for server in (self.server, *self.relays):
            server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def mbox(self, name='INBOX', email=EMAIL):
        return os.path.join(self.dest, email, name + '.mbox')

    def start(self, do=None, at=0, log=None, preexec_fn=None, **env):
        """The program in a group of its own, perhaps disturbed."""
        self.runs += 1
        self.disturbed += do is not None
        count = os.path.join(self.folder, 'count')
        with open(count, 'wb') as f:
            f.write(bytes(8))
        more = dict(env)
        if do is not None or log is not None:
            more.update(LD_PRELOAD=self.faults, FAULTS_UNDER=self.disk, FAULTS_COUNT=count)
        if do is not None:
            more.update(FAULTS_AT=str(at), FAULTS_DO=do)
        if log is not None:
            more['FAULTS_LOG'] = log
        return subprocess.Popen([PROGRAM, self.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                stdin=subprocess.DEVNULL, cwd=self.folder, start_new_session=True, preexec_fn=preexec_fn,
                                env=dict(os.environ, **more))

    def run(self, do=None, at=0, log=None, **env):
        """(exit status, messages)"""
        process = self.start(do, at, log, **env)
        err = process.communicate(timeout=100)[1].decode(errors='replace')
        return process.returncode, err

    def operations(self):
        with open(os.path.join(self.folder, 'count'), 'rb') as f:
            return struct.unpack('=Q', f.read(8))[0]

    def logged(self, log):
        operations = parse_log(log) if os.path.exists(log) else []
        if operations:
            os.unlink(log)
        return operations

    # -- what must hold --

    def expect(self, box, name='INBOX'):
        """(mails of the server, mails that are gone)"""
        now = held(self.view(box, name))
        ids = {(name, archive.own_id(m.data) or m.data) for m in now}
        return now, [m for key, m in self.known.items() if key[0] == name and key not in ids]

    def remember(self, box, where=None):
        for name in self.names:
            for m in held(self.view(box, name)):
                (self.known if where is None else where)[name, archive.own_id(m.data) or m.data] = m

    def serve(self, box):
        self.server.boxes = {name: self.view(box, name) for name in self.names}
        if self.seen is not None:
            self.remember(box, self.seen)

    def met(self, now, gone):
        stored = {whole_of(s): s.state & ~archive.GONE for s in archive.read(self.mbox())}
        have = {archive.own_id(m.data) or m.data for m in now + gone}
        gone = gone + [m for (_, key), m in self.seen.items()
                       if key not in have and archive.quote(m.data) in stored]
        return [m._replace(state=stored.get(archive.quote(m.data), 0)) for m in gone]

    def complaints(self, box, torn=False):
        """torn: copies that are not whole may stand besides."""
        wrong = []
        for name in self.names:
            now, gone = self.expect(box, name)
            if self.seen is not None:   # of what is gone, any state may be the last that a run has met
                gone = self.met(now, gone)
            for email in self.ports or [EMAIL]:
                path = self.mbox(name, email)
                if torn:
                    path = self.without_parts(path, {archive.quote(m.data) for m in now + gone})
                wrong += ['%s, %s: %s' % (email, name, w) for w in archive.compare(path, now, gone=gone)]
        return wrong

    def without_parts(self, path, whole):
        """A copy of an archive without what a torn mail has left: parts of mails; whole ones, marked as
        gone, that were fetched again for safety; what has no status line."""
        with open(path, 'rb') as f:
            chunks = re.split(rb'(?m)^(?=From )', f.read())[1:]
        mails = [(chunk, *re.match(rb'[^\n]*\n(?:X-Mozilla-Status: ([0-9a-f]{4})\n)?((?s:.*))\n', chunk).groups())
                 for chunk in chunks]
        mails = [(chunk, int(digits, 16), whole_of(archive.Stored('', 0, text)))
                 for chunk, digits, text in mails if digits]
        live = {text for _, state, text in mails if not state & archive.GONE}
        path = os.path.join(self.folder, 'kept')
        with open(path, 'wb') as f:
            for chunk, state, text in mails:
                if text in whole and not (state & archive.GONE and text in live) or text not in whole and not (
                        state & archive.GONE or any(w.startswith(text.rstrip(b'\n\0')) for w in whole)):
                    f.write(chunk)
        return path

    def settle(self, box, what, torn=False):
        """After whatever happened: one run mends it, a further run changes no byte."""
        self.serve(box)
        status, err = self.run()
        try:
            assert status == 0, 'exit status %d' % status
            wrong = self.complaints(box, torn)
            assert not wrong, '\n'.join(wrong[:6])
            before = tree(self.disk)
            status, again = self.run()
            assert status == 0, 'exit status %d of the further run: %s' % (status, again)
            after = tree(self.disk)
            changed = [p for p in set(before) | set(after) if before.get(p) != after.get(p)]
            assert not changed, 'a further run changes %s: %s' % (changed, again)
        except AssertionError as e:
            raise AssertionError('%s: %s\n%s' % (what, e, err)) from None


class Step:
    """One run of a history. before: files on the disk; was, box: the server at the run before and now."""

    def __init__(self, rig, name, was, box, torn=False):
        self.name, self.was, self.box, self.torn = name, was, box, torn
        self.before, self.known = tree(rig.disk), dict(rig.known)


STEPS = 'first', 'changed', 'renumbered', 'rebuilt', 'older index', 'torn tail', 'changed again'


def history(rig, rng, names=STEPS):
    """The steps, each from the disk that the undisturbed run of the one before left."""
    steps, box, was = [], imapd.Mailbox(first_mails(rng)), imapd.Mailbox()
    for name in names:
        files, index = tree(rig.disk), 'backup/%s/INBOX.mbox.index' % EMAIL
        without_index = {path: octets for path, octets in files.items() if not path.endswith('.index')}
        if name.startswith('changed'):
            box = then_changed(rng, copy_box(box))
        elif name == 'renumbered':
            box = then_renumbered(rng, copy_box(box))
        elif name == 'rebuilt':
            files = without_index
        elif name == 'older index':
            box = then_changed(rng, copy_box(box))
            rig.serve(box)
            assert rig.run()[0] == 0
            rig.remember(box)
            files = dict(tree(rig.disk), **{index: files[index]})
            was, box = box, copy_box(box)
            for m in box.mails:
                box.flag(m.uid, '$Forwarded' if '\\Seen' in m.flags else '\\Seen')
        elif name == 'torn tail':
            files = dict(without_index, **{index[:-6]: files[index[:-6]][:-1000]})
        plant(rig.disk, files)
        step = Step(rig, name, was, box, name in ('torn tail', 'changed again'))
        rig.settle(box, name, step.torn)
        rig.remember(box)
        steps.append(step)
        was = box
    return steps


def begin(rig, step):
    plant(rig.disk, {path.replace(EMAIL, email): octets for email in rig.ports or [EMAIL]
                     for path, octets in step.before.items()})
    rig.known = dict(step.known)
    rig.serve(step.box)


def undisturbed(rig, step):
    """A step's run: (how many operations, those that succeeded)."""
    begin(rig, step)
    log = os.path.join(rig.folder, 'log')
    status, err = rig.run(log=log)
    assert status == 0, err
    return rig.operations(), rig.logged(log)


def kill_at(rig, step, n, how, after, dies='group'):
    """Killed at the n-th operation, before it or half way through; the server may change after that."""
    begin(rig, step)
    rig.run(how, n, FAULTS_DIES=dies)
    rig.settle(after, '%s, killed %s operation %d (%s)%s' % (
        step.name, how, n, dies, '' if after is step.box else ', then changed'), step.torn)


def kills(rig, rng, steps, some=1.0):
    for step in steps:
        wavers = then_wavers(step.was, step.box)
        for n in range(1, undisturbed(rig, step)[0] + 1):
            for how in ('before', 'half'):
                for after in (step.box, wavers):
                    if rng.random() < some:
                        kill_at(rig, step, n, how, after)
            if rng.random() < some:
                kill_at(rig, step, n, 'before', step.box, rng.choice(('self', 'parent')))


def cuts(rig, rng, steps, some=1.0, randoms=4):
    """The power goes after each operation of a step."""
    for step in steps:
        operations, seen = undisturbed(rig, step)[1], set()
        disk = Disk(rig.disk, step.before)
        for n in range(len(operations) + 1):
            if n > 0:
                disk.apply(*operations[n - 1])
            for how in ('none', 'all', 'mbox', 'index') + ('random',) * randoms:
                files = disk.cut(how, rng)
                digest = hashlib.sha256(repr(sorted(files.items())).encode()).digest()
                if digest in seen or rng.random() >= some:
                    continue
                seen.add(digest)
                begin(rig, step)
                plant(rig.disk, files)
                rig.disturbed += 1
                after = step.box if rng.random() < .7 else then_wavers(step.was, step.box)
                rig.settle(after, '%s, power cut after operation %d (%s)%s' % (
                    step.name, n, how, '' if after is step.box else ', then changed'), step.torn)


def tears(rig, rng, steps, some=1.0):
    """The archive's last mail torn at each octet, without an index, or with one that is at rest: it is never
    taken for a whole one. Its body has empty lines, From lines and a forged header."""
    last = sample.Mail(b'Subject: torn\r\nMessage-ID: <torn@x>\r\nFrom: a@x\r\n\r\na\r\n\r\nFrom b\r\n\r\n\r\n'
                       b'From MAILER-DAEMON Thu Jan  1 00:00:00 1970\r\nX-Mozilla-Status: 0000\r\n'
                       b'Message-ID: <torn@x>\r\n\r\nforged\r\n\r\n\r\n', '\\Seen', 9)
    for data in (last.data, last.data.replace(b'Message-ID: <torn@x>\r\n', b'', 1), last.data.rstrip() + b'.'):
        plant(rig.disk, {})
        rig.known = {}
        box = imapd.Mailbox([sample.mail(rng, 'before'), last._replace(data=data)])
        rig.settle(box, 'tears')
        files, path = tree(rig.disk), 'backup/%s/INBOX.mbox' % EMAIL
        whole = files[path]
        for at in range([m.start() for m in re.finditer(rb'(?m)^From ', whole)][1], len(whole)):
            for index in (True, False):
                if rng.random() >= some:
                    continue
                torn = dict(files, **{path: whole[:at]})
                if not index:
                    del torn[path + '.index']
                plant(rig.disk, torn)
                rig.disturbed += 1
                rig.settle(box, 'torn at octet %d of %d' % (at, len(whole)), torn=True)


MESSAGES = {'ENOSPC': 'No space left', 'EIO': 'Input/output error', 'EROFS': 'Read-only', 'EDQUOT': 'quota'}


def fault_at(rig, step, n, error, ever):
    """The n-th operation fails, or all from then on; then the disk is well again."""
    begin(rig, step)
    status, err = rig.run(error, n, **({'FAULTS_EVER': '1'} if ever else {}))
    what = '%s, %s at operation %d%s' % (step.name, error, n, ' and ever after' if ever else '')
    assert status in ((1,) if ever else (0, 1)), '%s: exit status %d\n%s' % (what, status, err)
    assert status == 0 or MESSAGES[error] in err, '%s: no such message\n%s' % (what, err)
    assert 'worker died' not in err, '%s\n%s' % (what, err)
    if error == 'ENOSPC' and os.path.exists(rig.mbox()) and not step.torn:
        now, gone = rig.expect(step.box)
        whole = {archive.quote(m.data) for m in now + gone}
        try:
            stored = archive.read(rig.mbox())
        except AssertionError as e:
            raise AssertionError('%s: %s\n%s' % (what, e, err)) from None
        for s in stored:
            assert whole_of(s) in whole, '%s: a torn mail stands there: %r' % (what, s.text[:200])
    rig.settle(step.box, what, step.torn)


def disk_faults(rig, rng, steps, some=1.0):
    for step in steps:
        n_all = undisturbed(rig, step)[0]
        for n in range(1, n_all + 1):
            for error in MESSAGES:
                for ever in (False, True):
                    if rng.random() < some * (1 if error in ('ENOSPC', 'EIO') else .2):
                        fault_at(rig, step, n, error, ever)
            if rng.random() < some:
                begin(rig, step)
                status, err = rig.run('short', n)
                assert status == 0, 'a short write, operation %d: %s' % (n, err)
                rig.settle(step.box, '%s, a short write at %d' % (step.name, n), step.torn)


def chain(rig, rng, links):
    """One archive's life: kills, power cuts and faults one after the other, with and without a whole run
    between, while the server goes on changing."""
    plant(rig.disk, {})
    rig.known, rig.seen = {}, {}
    box, was, torn = imapd.Mailbox(first_mails(rng)), imapd.Mailbox(), False
    disk, story = Disk(rig.disk, {}), []
    log = os.path.join(rig.folder, 'log')
    for _ in range(links):
        what = rng.choice(('kill', 'kill', 'cut', 'cut', 'error', 'signal', 'change', 'waver', 'renumber', 'settle'))
        story.append(what)
        rig.serve(box)
        n = rng.randint(1, rng.choice((8, 60)))
        if what == 'change' or what == 'renumber':
            was, box = box, (then_changed if what == 'change' else then_renumbered)(rng, copy_box(box))
        elif what == 'waver':
            was, box = box, then_wavers(was, box)
        elif what == 'settle':
            rig.settle(box, ' '.join(story), torn)
            rig.remember(box)
            disk = Disk(rig.disk, tree(rig.disk))
        elif what == 'signal':
            process = rig.start('-', 0, log=log)
            time.sleep(rng.random() * .06)
            os.killpg(process.pid, rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            process.communicate()
        elif what == 'error':
            rig.run(rng.choice(('ENOSPC', 'EIO')), n, log=log, **(
                {'FAULTS_EVER': '1'} if rng.random() < .5 else {}))
        else:
            rig.run(rng.choice(('before', 'half')), n, log=log)
        for operation in rig.logged(log):
            disk.apply(*operation)
        if what == 'cut':
            files = disk.cut(rng.choice(('none', 'all', 'mbox', 'index', 'random', 'random', 'random')), rng)
            plant(rig.disk, files)
            disk = Disk(rig.disk, files)
    box = copy_box(box)
    box.add(b'Message-ID: <last@x>\r\n\r\nnews, for servers without CONDSTORE\r\n')
    rig.settle(box, ' '.join(story), torn)


def chains(rig, rng, until):
    n = 0
    while time.monotonic() < until:
        seed = rng.getrandbits(32)
        try:
            chain(rig, random.Random(seed), 12)
        except AssertionError as e:
            raise AssertionError('chain %d: %s' % (seed, e)) from None
        n += 1
    return n


def forgetful(session):
    """One that leaves out some mails where several are asked for at once: often, the next mailbox is open by
    the time that they are asked for again. Not those whose Message-ID is made: it is numbered as they come."""
    class Forgetful(session):
        def fetch(self, args):
            self.several = not args.split()[0].isdigit()
            session.fetch(self, args)

        def fetch_mail(self, number, m, items):
            if m.uid % 3 or not (self.several and 'BODY.PEEK[]' in items and archive.own_id(m.data)):
                session.fetch_mail(self, number, m, items)
    return Forgetful


def lines(rig, rng, many=200):
    """Three mailboxes on one connection, in the clear, over TLS and STARTTLS: the line is cut after each octet
    of a small session that either side sends, in an order by chance; and of a large one anywhere, once or
    twice or until it has brought all. 'many' lines at a time; goes on for ever, yields after each time."""
    certificate = servers.Certificates(os.path.join(rig.folder, 'certs'))
    rig.relays = relays = [imapd.Relay(rig.server.port) for _ in range(many)]
    rig.names, small, large = ['INBOX', 'A', 'Sent'], [], []
    rig.server.session = forgetful(rig.server.session)

    def begin_at(few, step, tls, plans):
        """plans: for each account where and how its connections are cut, one after the other."""
        rig.view = lambda box, name: apart(box, name, few)
        rig.server.implicit_tls, rig.server.certificate = tls == 'TLS', certificate.good if tls else None
        rig.server.forget()
        rig.ports = {'u%d@example.org' % n: relay.port for n, relay in enumerate(relays[:len(plans)])}
        for relay, plan in zip(relays, plans):
            relay.cut, relay.count = lambda k, plan=plan: plan[k - 1] if k <= len(plan) else None, 0
        begin(rig, step)

    for few in (True, False):
        rig.view, rig.server.certificate = lambda box, name: apart(box, name, few), None
        rig.ports, rig.known, rig.server.implicit_tls = {}, {}, False
        rig.config()
        plant(rig.disk, {})
        for step in history(rig, rng, STEPS[:4]):
            for tls in ('', 'TLS', 'STARTTLS'):
                begin_at(few, step, tls, [()])
                rig.config(ca_file=certificate.ca)
                relays[0].down = relays[0].up = 0
                assert rig.run()[0] == 0
                places = list(range(-relays[0].up, relays[0].down))
                rng.shuffle(places)
                size = many if few else len(places)
                (small if few else large).extend((few, step, tls, places[at:at + size])
                                                 for at in range(0, len(places), size))
    rng.shuffle(small)
    print('%d places' % sum(len(x[3]) for x in small), flush=True)
    while True:
        few, step, tls, places = small.pop() if small and rng.random() < .8 else rng.choice(large)
        if not few:
            places = rng.choices(places, k=1 + many // 8)
        hows = [rng.choice(('rst', 'fin') * 12 + ('silence',)) for _ in places]
        plans = [[(at, how)] * (1 if how == 'silence' else rng.choice((1, 1, 2))) for at, how in zip(places, hows)]
        if not few and rng.random() < .3:   # a line that never holds for long
            plans = [[(max(places) // 2 + at // 2, how)] * 99 for at, how in zip(places, ('rst', 'fin') * many)]
        what = '%s, %s, cut: %s' % (step.name, tls or 'in the clear', [plan[0] for plan in plans])
        begin_at(few, step, tls, plans)
        rig.disturbed += len(plans)
        if rng.random() < .5:
            rig.config(ca_file=certificate.ca, timeout=6, retries=0)
            status, err = rig.run()
            assert status in (0, 1) and 'died' not in err, '%s: exit status %d\n%s' % (what, status, err)
        rig.config(ca_file=certificate.ca, timeout=6, retries=3)
        rig.settle(step.box, what)
        assert not rig.server.faults, '%s: %s' % (what, rig.server.faults)
        yield


PARTS = ['kills', 'cuts', 'tears', 'faults', 'chains', 'lines']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seed', type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument('--minutes', type=float, default=5, help='for chains, lines and mutate each')
    parser.add_argument('part', nargs='*', choices=[[], *PARTS, 'mutate'])
    options = parser.parse_args()
    print('seed %d' % options.seed, flush=True)
    failed = 0
    parts = options.part or [*PARTS, 'mutate']
    if 'mutate' in parts:
        parts.remove('mutate')
        try:
            print('mutate: %d episodes: ok' % mutate.episodes(run.sanitized(), options.seed, time.monotonic() +
                                                              60 * options.minutes), flush=True)
        except AssertionError as e:
            print('mutate: FAIL\n%s' % e, flush=True)
            failed += 1
    for session in (imapd.Session, Plain):
        for part in parts:
            rig, rng, began = Rig(session), random.Random(options.seed), time.monotonic()
            try:
                if part == 'chains':
                    chains(rig, rng, began + options.minutes * 30)
                elif part == 'lines':
                    for _ in lines(rig, rng):
                        if time.monotonic() > began + options.minutes * 30:
                            break
                else:
                    steps = history(rig, rng)
                    {'kills': kills, 'cuts': cuts, 'tears': tears, 'faults': disk_faults}[part](rig, rng, steps)
                result = 'ok'
            except AssertionError as e:
                result, failed = 'FAIL\n%s' % e, failed + 1
            finally:
                rig.close()
            print('%s, %s: %d disturbed of %d runs, %.0f s: %s' % (
                part, session.__name__, rig.disturbed, rig.runs, time.monotonic() - began, result), flush=True)
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
