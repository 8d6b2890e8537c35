"""A server that breaks its word in every way of its grammar drives the program, which is built with ASan and
UBSan; then an honest one must make the archive complete and right. `make torture ARGS=mutate`.

An episode has a seed, which decides all but what the timing of the connections does: it is one archive's
life of some runs, each with its own kinds of mutations.
"""
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time

import archive
import imapd
import sample

KINDS = ('noise', 'empty', 'wide', 'case', 'lost', 'twice', 'count', 'order', 'apart', 'nil', 'literal8', 'items',
         'refuse', 'bye', 'cut', 'silence', 'changes', 'segments')
PASSWORD = 'pa55word'
NOISE = ('* OK [ALERT] \x1b[31mred\x1b[0m', '* BAD what', '* NO [UNAVAILABLE] later', '* 3 EXPUNGE', '* 2 RECENT', '* OK',
         '* FLAGS (\\Seen [x] y)', '* OK [UIDVALIDITY 7] x', '* OK [UIDNEXT 99] x', '* OK [HIGHESTMODSEQ 9] x', '* 0 EXISTS',
         '* VANISHED 1:5', '* VANISHED (EARLIER) 900:950', '* STATUS INBOX (MESSAGES 3)', '* STATUS', '* SEARCH 77', '+ go on',
         '* ESEARCH (TAG "x") UID ALL 80:90', '* LIST () "/" Ghost', '* XYZZY (a (b "c") {3}\r\nabc)', 'A9 OK', '* BYE',
         '* CAPABILITY IMAP4rev1', '* OK [MESSAGELIMIT 3 5] x', '* 99 FETCH (FLAGS ())', '* 1 FETCH (UID 0 BODY[] {3}\r\nabc)',
         '* 1 FETCH (BODY[] "abc")', '* 1 FETCH ()', '* OK [CLOSED]', '* ENABLED', '* ID NIL', '* 4294967296 EXISTS')


class Honest(imapd.Session):
    def fetch_body(self, m, item):
        self.server.bodies += item == 'BODY.PEEK[]'
        return imapd.Session.fetch_body(self, m, item)


class Mutant(imapd.Session):
    """server.kinds: what it does; server.rate: how often."""

    def setup(self):
        self.rng = random.Random('%s %d' % (self.server.seed, self.number))
        if self.hit('cut', 5):
            self.cut = self.rng.randrange(1, 30_000), self.rng.choice(('rst', 'fin', 'close'))
        if 'segments' in self.server.kinds:
            self.segment = self.rng.choice((1, 7, 100, 1000))

    def hit(self, kind, often=1.0):
        return kind in self.server.kinds and self.rng.random() < self.server.rate * often

    def flush(self):
        data = self.output
        if 'octets' in self.server.kinds and data:
            for _ in range(self.rng.choice((0, 0, 1, 3))):
                at = self.rng.randrange(len(data) + 1)
                put = self.rng.choice((b'', b'(', b')', b'"', b'{9}\r\n', b'\0', b'\r\n', b' ', b'NIL', b'4294967295',
                                       data[at:at + 20] * 2, self.rng.randbytes(1)))
                data = data[:at] + put + data[at + self.rng.randrange(4):]
        self.output = data
        imapd.Session.flush(self)

    def line(self, text):
        untagged = text.startswith('* ')
        if self.hit('noise'):
            self.put(self.rng.choice(NOISE) + '\r\n')
        if self.hit('empty'):
            self.put(self.rng.choice(('\r\n', '\n', ' \r\n')))
        if self.hit('count') and text.endswith('EXISTS'):
            text = '* %d EXISTS' % self.rng.choice((0, 1, int(text.split()[1]) + 1, 1 << 31))
        if self.hit('wide') and '"' not in text:
            text = text.replace(' ', '  ')
        if self.hit('case') and '"' not in text and untagged:
            text = text.lower()
        for _ in range(0 if untagged and self.hit('lost', 0.3) else 2 if untagged and self.hit('twice') else 1):
            imapd.Session.line(self, text)

    def one(self):
        if self.hit('changes'):
            self.server.change(self.rng)
        if self.user and self.hit('bye', 0.2):
            self.bye(self.rng.choice(('going down', '[UNAVAILABLE] x', '')), self.rng.choice(('close', 'rst')))
        if self.hit('silence', 0.05):
            self.drop('silence')
        imapd.Session.one(self)

    def greet(self):
        imapd.Session.greet(self)
        if self.server.hook is None:
            self.hooked = self.refuse

    def refuse(self, session, tag, name, args):
        if self.hit('refuse', 0.3) and name not in ('AUTHENTICATE', 'LOGIN', 'LOGOUT'):
            answer = self.rng.choice((' NO not now', ' BAD no', ' NO', ' NO [SERVERBUG] x', ' NO [THROTTLED] x', ' OK',
                                      ' NO [LIMIT] x', ' BAD [CLIENTBUG] x', ' NO [EXPUNGEISSUED] x', ' MAYBE'))
            if name == 'EXAMINE' and answer == ' OK':
                return False   # the mails of another mailbox would follow, and nobody could know it
            self.line(tag + answer)
            return True

    def in_order(self, when):
        """What a method says, line by line, in another order perhaps."""
        kept, self.line = [], lambda text: kept.append(text)
        when(self)
        del self.line
        if self.hit('order'):
            self.rng.shuffle(kept)
        for text in kept:
            self.line(text)

    def examine_lines(self):
        self.in_order(imapd.Session.examine_lines)

    def search_line(self, tag, uids, extended):
        if self.hit('lost', 0.5) and uids:
            uids.remove(self.rng.choice(uids))
        if self.hit('order'):
            self.rng.shuffle(uids)
        if self.hit('twice'):
            uids = uids + uids
        for uid in uids if self.hit('apart') else ():
            self.line('* SEARCH %d' % uid)
            return
        imapd.Session.search_line(self, tag, uids, extended and not self.hit('apart'))

    def fetch(self, args):
        kept = []
        self.fetch_mail = lambda *mail: kept.append(mail)
        imapd.Session.fetch(self, args)
        del self.fetch_mail
        if self.hit('order'):
            self.rng.shuffle(kept)
        for mail in kept:
            if self.hit('noise', 0.3):
                self.put(self.rng.choice(NOISE) + '\r\n')
            for _ in range(0 if self.hit('lost', 0.3) else 2 if self.hit('twice') else 1):
                self.fetch_mail(*mail)

    def body(self, name, data):
        if self.hit('nil', 0.3):
            return name + self.rng.choice((b' NIL', b' ""', b' {0}\r\n'))
        text = imapd.Session.body(self, name, data)
        return text.replace(b' {', b' ~{', 1) if self.hit('literal8') else text

    def fetch_mail(self, number, m, items):
        parts = self.fetch_items(m, items)
        uid, rest = parts[0], parts[1:]
        if self.hit('items'):
            rest.insert(self.rng.randrange(len(rest) + 1), self.rng.choice(
                (b'X-GM-MSGID 17', b'X (a (b "c") {2}\r\n)))', b'MODSEQ (5)', b'EMAILID (x)', b'BODY[TEXT] "x"', b'X NIL')))
        if self.hit('case'):
            rest = [p if b'{' in p or b'"' in p else p.lower() for p in rest]
        groups = [rest]
        if self.hit('apart') and len(rest) > 1:
            at = self.rng.randrange(1, len(rest))
            groups = [rest[:at], rest[at:]]
        for group in groups:
            group = [uid, *group]
            if self.hit('order'):
                self.rng.shuffle(group)
            self.put(b'* %d FETCH (' % number + (b'  ' if self.hit('wide') else b' ').join(group) + b')' +
                     (b' ' if self.hit('wide') else b'') + b'\r\n')


class Episode:
    """One archive and what befalls it."""

    def __init__(self, program, seed, say=lambda text: None):
        self.program, self.seed, self.say, self.rng = program, seed, say, random.Random(seed)
        memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
        self.folder = tempfile.mkdtemp(prefix='ib-mutate-', dir=memory)
        self.dest, self.path = os.path.join(self.folder, 'backup'), os.path.join(self.folder, 'config.json')
        rng, self.number, self.known = self.rng, 0, {}
        self.forged = sample.forged(random.Random(1))[:70]
        self.boxes = {name: imapd.Mailbox(uidvalidity=rng.randrange(1000, 2000))
                      for name in ['INBOX', *rng.sample(('Sent', 'a/b', 'x "y"', 'caf&AOk-', 'b c'), rng.randrange(3))]}
        for box in self.boxes.values():
            for _ in range(rng.choice((0, 1, 3, 8, 20))):
                self.add(box, rng)
        capabilities = ' '.join(['IMAP4rev1'] + [c for c in imapd.FULL.split()[1:] if rng.random() < .6])
        self.server = imapd.Server(self.boxes, password=PASSWORD)
        self.sessions = [type(s.__name__, (s,), {'capabilities': capabilities, 'literals': rng.random() < .1})
                         for s in (Mutant, Honest)]
        self.server.change = self.change
        self.keys = {'retries': rng.choice((0, 1, 1, 2)), 'total_processes': 3, 'timeout': 2,
                     'processes_per_account': rng.choice((1, 1, 2)), 'header_batch_size': rng.choice((1, 2, 5, 500)),
                     'email_batch_size': rng.choice((1, 2, 3, 50))}
        with open(self.path, 'w') as f:
            json.dump(dict(self.keys, destination=self.dest, accounts=[
                {'email': 'a@x', 'host': '127.0.0.1', 'port': self.server.port, 'ssl': False, 'password': PASSWORD}]), f)
        os.chmod(self.path, 0o600)

    def close(self):
        self.server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the mailboxes --

    def add(self, box, rng):
        """A mail of its own; some come twice."""
        self.number += 1
        with box.lock:
            m = rng.choice(box.mails) if box.mails and rng.random() < .1 else None
            if m and archive.own_id(m.data):
                box.add(m.data, '', m.when)
                return
        m = sample.mail(rng, 'mail %d' % self.number, message_id=rng.random() < .8)
        if rng.random() < .3:
            m = m._replace(data=b'Message-ID: <n%d@x>\r\nSubject: %d\r\n' % (self.number, self.number) +
                           rng.choice(self.forged).split(b'\r\n', 1)[1])
        with box.lock:
            box.uidnext += rng.choice((0, 0, 0, 5))
            box.add(m.data, m.flags, m.when)
            self.remember()

    def remember(self):
        """All mails that ever were there."""
        for name, box in self.boxes.items():
            for m in box.mails:
                self.known[name, m.data] = m

    def change(self, rng):
        for box in self.boxes.values():
            with box.lock:
                for _ in range(rng.choice((0, 0, 1, 3))):
                    self.add(box, rng)
                for _ in range(rng.choice((0, 0, 1, 2))):
                    if box.mails:
                        box.expunge(rng.choice(box.mails).uid)
                for _ in range(rng.choice((0, 1, 3))):
                    if box.mails:
                        box.flag(rng.choice(box.mails).uid, rng.choice(sample.FLAGS))

    def damage(self, rng):
        """What may happen to an index between two runs."""
        paths = [os.path.join(self.dest, 'a@x', f) for f in sorted(os.listdir(os.path.join(self.dest, 'a@x')))
                 if f.endswith('.index')] if os.path.isdir(os.path.join(self.dest, 'a@x')) else []
        if not paths or rng.random() < .7:
            return
        path, how = rng.choice(paths), rng.choice(('gone', 'bits', 'cut', 'more'))
        with open(path, 'rb') as f:
            data = bytearray(f.read())
        if how == 'bits':
            for _ in range(rng.choice((1, 5))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == 'cut':
            del data[rng.randrange(len(data)):]
        elif how == 'more':
            data += rng.randbytes(rng.choice((1, 64, 200)))
        with open(path, 'wb') as f:
            f.write(data)
        if how == 'gone':
            os.unlink(path)

    # -- runs --

    def run(self, what, *args):
        began = time.monotonic()
        env = dict(os.environ, ASAN_OPTIONS='detect_leaks=0:exitcode=99:verify_asan_link_order=0',
                   UBSAN_OPTIONS='print_stacktrace=1:exitcode=99')
        done = subprocess.run([self.program, *args, self.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              stdin=subprocess.DEVNULL, env=env, timeout=120)
        err = (done.stdout + done.stderr).decode(errors='replace')
        what = 'seed %d, %s' % (self.seed, what)
        assert done.returncode in (0, 1) and 'Sanitizer' not in err and 'runtime error' not in err and \
            'died' not in err, '%s: exit status %d\n%s' % (what, done.returncode, err[-6000:])
        assert PASSWORD not in err and '\x1b' not in err, '%s shows what it must not\n%s' % (what, err[-3000:])
        assert time.monotonic() - began < 90, '%s takes %d s\n%s' % (what, time.monotonic() - began, err[-3000:])
        return done.returncode, err

    def mutated(self, rng):
        """A run at the mutating server."""
        kinds = [k for k in KINDS if rng.random() < .35]
        lying = rng.random() < .15
        self.server.kinds, self.server.rate = kinds + ['octets'] * lying, rng.choice((.02, .05, .1, .3))
        self.server.seed, self.server.session = rng.getrandbits(32), self.sessions[0]
        self.server.forget()
        what = 'mutated: ' + ' '.join(self.server.kinds)
        status, err = self.run(what, *rng.choice(((), ('-v',), ('-vv',))))
        self.say('%s, rate %g: exit status %d' % (what, self.server.rate, status))
        if lying:   # what it said may have been taken for mail
            for base, _, names in os.walk(self.dest):
                for name in names:
                    if name.endswith('.mbox'):
                        archive.read(os.path.join(base, name))
            shutil.rmtree(self.dest, ignore_errors=True)
        return what

    def honest(self, what):
        """Everything is right after an honest run, and one more changes nothing and fetches no mail."""
        self.server.session, self.server.hook = self.sessions[1], None
        for box in self.boxes.values():   # what was told of flags may have been lost: they are told anew
            self.add(box, self.rng)
            for m in box.mails:
                box.flag(m.uid, ' '.join(m.flags ^ {'\\Flagged'}))
        self.remember()
        self.server.faults, self.server.bodies = [], 0
        status, err = self.run('honest after ' + what)
        wrong = [] if status == 0 else ['exit status %d' % status]
        wrong += self.server.faults
        for name, box in self.boxes.items():
            path = os.path.join(self.dest, 'a@x', archive.file_name(name))
            wrong += ['%s: %s' % (name, c) for c in self.complaints(path, name, box)] if os.path.exists(path) else [
                'there is no ' + path]
        before, self.server.bodies = archive.digests(self.dest), 0
        status, again = self.run('one more')
        if status != 0 or self.server.bodies or archive.digests(self.dest) != before:
            wrong.append('one more: exit status %d, %d mails fetched, %s\n%s' % (
                status, self.server.bodies, 'changed' if archive.digests(self.dest) != before else 'nothing changed', again))
        assert not wrong, 'seed %d, honest after %s:\n%s\n%s' % (self.seed, what, '\n'.join(wrong[:8]), err[-3000:])

    def complaints(self, path, name, box):
        """Of what is no longer there, or was told of another mailbox, whatever was stored must be marked so."""
        now = [archive.Mail(m.uid, m.data, archive.state_of(m.flags), m.when,
                            imapd.header_fields(m.data, 'FROM TO CC DATE SUBJECT')) for m in box.mails]
        have = {archive.own_id(m.data) or m.data for m in now}
        stored = {re.sub(rb'^Message-ID: <[0-9a-f]{40}@imap_backup\.py\.local>\n', b'', s.text): s.state
                  for s in archive.read(path)}
        gone = {archive.own_id(m.data) or m.data: archive.Mail(
            m.uid, m.data, stored[archive.quote(m.data)], m.when, imapd.header_fields(m.data, 'FROM TO CC DATE SUBJECT'))
            for m in self.known.values()
            if (archive.own_id(m.data) or m.data) not in have and archive.quote(m.data) in stored}
        return archive.compare(path, now, gone=list(gone.values()))

    def live(self):
        rng = self.rng
        for _ in range(rng.randrange(1, 4)):
            self.change(rng)
            for box in self.boxes.values():
                if rng.random() < .1:
                    box.renumber()
            what = self.mutated(rng)
            self.damage(rng)
            if rng.random() < .5:
                self.honest(what)
        self.honest(what)


def episodes(program, seed, until, say=lambda text: None):
    """How many, one after the other, until that time; the first has this seed."""
    n = 0
    while n == 0 or time.monotonic() < until:
        episode = Episode(program, seed + n, say)
        try:
            episode.live()
        finally:
            episode.close()
        n += 1
    return n
