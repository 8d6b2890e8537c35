"""What servers say that Dovecot does not: odd ones, broken ones, lying ones, and lines that are cut.

Most tests here are tables. Each entry is an account with a scripted server of its own; all accounts of
a table are backed up side by side in one run, three times: with the odd server, after changes in the
mailbox (the entry says whether the server is still odd then), and by an honest server. What must hold
for every one of them is in play().
"""
import base64
import os
import random
import re
import signal
import subprocess
import threading
import time

import archive
import imapd
import sample
from imapd import BARE, FULL, Mailbox, Relay, Server, Session
from run import PROGRAM
from torture import held


def letters(n=12, label='m'):
    """Ordinary mails, some without a Message-ID."""
    rng = random.Random(label)
    return [sample.mail(rng, '%s %d' % (label, i), message_id=i % 5 != 3) for i in range(n)]


class Case:
    """
    odd      what is odd: attributes and methods of a Session, by name
    boxes    {name on the wire: Mailbox}; None: an INBOX with some mails and, unless it fails as a whole, another
             one whose commands may be on the wire before it is over
    runs     in which of the three runs it is odd
    fails    how many failures its summary tells in an odd run
    lacks    UIDs of the INBOX that an odd run cannot get
    says     patterns of what is printed for the account in the odd runs
    flag     which of the mails is flagged between the first two runs
    keeps    an odd run proves nothing: what has gone keeps its state
    tries    connections of an odd run, at most
    skips    names of mailboxes that an odd run cannot or must not back up
    account  more keys of the account
    """

    def __init__(self, boxes=None, runs=(1, 2), fails=0, lacks=(), says=(), skips=(), hook=None, delimiter='/',
                 password='secret', account=None, tries=99, keeps=False, flag=1,
                 **odd):
        self.boxes = boxes or {'INBOX': Mailbox(letters())}
        if boxes is None and (lacks or not fails):
            self.boxes['Behind'] = Mailbox(letters(3, 'behind'))
        self.runs, self.fails, self.lacks, self.skips = runs, fails, set(lacks), set(skips)
        self.says = [says] if isinstance(says, str) else says
        self.session = type('Odd', (Session,), odd)
        self.hook, self.delimiter, self.password, self.account = hook, delimiter, password, account or {}
        self.tries, self.keeps, self.flag = tries, keeps, flag
        self.gone = {name: [] for name in self.boxes}

    def change(self):
        """New, gone and flagged mails in the first mailbox with some."""
        for name, box in self.boxes.items():
            if len(box.mails) > 8:
                rng = random.Random(name)
                for i in range(2):
                    m = sample.mail(rng, 'new %d' % i)
                    box.add(m.data, m.flags, m.when)
                if 1 not in self.runs or name not in self.skips:
                    self.gone[name].append(held(box)[1])
                box.expunge(box.mails[1].uid)
                box.flag(box.mails[self.flag].uid, '\\Seen \\Flagged')
                break

    def complaints(self, folder, odd):
        out = []
        for name, box in self.boxes.items():
            if re.search(r'\\noselect|\\nonexistent', box.attributes, re.I) or odd and name in self.skips:
                continue
            lacks = self.lacks if odd and name == 'INBOX' else ()
            path = os.path.join(folder, archive.file_name(name, self.delimiter))
            if not os.path.exists(path):
                out.append('%s: there is no %s' % (name, path))
                continue
            gone, live = self.gone[name], [m for m in held(box) if m.uid not in lacks]
            if odd and self.keeps:
                gone, live = [], gone + live
            out += ['%s: %s' % (name, c) for c in archive.compare(path, live, gone=gone)]
        return out


def watch(process, peaks):
    """Sample the peak resident sets, in KiB, of a process and its children, until it ends."""
    def peak(pid):
        with open('/proc/%d/status' % pid) as f:
            m = re.search(r'VmHWM:\s*(\d+)', f.read())
        if m:
            peaks[pid] = int(m.group(1))

    while process.poll() is None:
        try:
            peak(process.pid)
            with open('/proc/%d/task/%d/children' % (process.pid, process.pid)) as f:
                for pid in f.read().split():
                    peak(int(pid))
        except OSError:
            pass
        time.sleep(0.01)


def run(t, accounts, limit=60, mails=0, **more):
    """Back them all up at once: (exit status, {email: lines}, stderr)."""
    t.config(*accounts, **dict({'total_processes': 64, 'timeout': 4, 'email_batch_size': 5,
                                'header_batch_size': 7}, **more))
    process = subprocess.Popen([PROGRAM, '-v', t.path], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               start_new_session=True)
    peaks = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    ender = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    ender.start()
    err = process.communicate()[1].decode()
    ender.cancel()
    watcher.join()
    assert process.returncode >= 0, 'hangs; said:\n' + err
    assert 'a worker died' not in err, err
    parent = peaks.pop(process.pid, None)
    if parent and peaks and '/build/' not in PROGRAM:   # a sanitizer's memory is not ours
        assert max(peaks.values()) < parent + 8192 + 24 * mails // 1024, 'a worker took %d KiB, the parent %d' % (
            max(peaks.values()), parent)
    assert not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f]', err), 'control characters: %r' % err
    said = {a['email']: [] for a in accounts}
    for line in err.splitlines():
        for word in line.split(': ')[:2]:   # "warning: " may stand in front
            if word in said:
                said[word].append(line)
    return process.returncode, said, err


def play(t, cases, **more):
    """The table: each case in three runs, and what must hold."""
    servers, accounts, complaints = {}, [], []
    for name, case in cases.items():
        servers[name] = Server(case.boxes, password=case.password)
        t.cleanups.append(servers[name].stop)
        accounts.append(dict({'email': name + '@x', 'host': '127.0.0.1', 'port': servers[name].port,
                              'password': case.password, 'processes_per_account': 1}, **case.account))
    for number in (1, 2, 3):
        failed = False
        for name, case in cases.items():
            odd = number in case.runs
            servers[name].session, servers[name].hook = (case.session, case.hook) if odd else (Session, None)
            servers[name].forget()
            failed = failed or odd and case.fails > 0
            if number == 2:
                case.change()
        before = archive.digests(t.dest) if number == 3 else None
        status, said, err = run(t, accounts, **more)
        if status != failed:
            complaints.append('run %d: exit status %d' % (number, status))
        for name, case in cases.items():
            odd, lines = number in case.runs, '\n'.join(said[name + '@x'])
            found = case.complaints(os.path.join(t.dest, name + '@x'), odd)
            fails = re.search(r', (\d+) FAILED', lines)
            if int(fails.group(1) if fails else 0) != (case.fails if odd else 0):
                found.append('%s failures' % (fails.group(1) if fails else 0))
            found += ['not said: ' + s for s in case.says if odd and not re.search(s, lines, re.M)]
            if odd and len(servers[name].sessions) > case.tries:
                found.append('%d connections' % len(servers[name].sessions))
            found += servers[name].faults
            if number == 3 and 2 not in case.runs and ' 0 new, 0 gone, 0 back' not in lines:
                found.append('news in the third run')
            if found:
                complaints.append('run %d, %s%s: %s\n  said: %s\n  heard: %s' % (
                    number, name, ' (odd)' if odd else '', '\n  '.join(found[:5]), lines.replace('\n', '\n    '),
                    '\n    '.join(servers[name].lines()[-12:])))
        if before is not None:
            now = archive.digests(t.dest)
            complaints += ['run 3 changed ' + path for path in now if 2 not in cases[path.split('@')[0]].runs
                           and now[path] != before.get(path)]
    assert not complaints, '\n'.join(complaints[:20])
    return servers


# ---- odd, but nothing is lost ----

def bare_lf():
    """Line ends without CR, but not inside mails."""
    def body(self, name, data):
        return b'%s {%d}\n%s' % (name, len(data), data)

    def fetch_mail(self, number, m, items):
        self.put(b'* %d FETCH (' % number + b' '.join(self.fetch_items(m, items)) + b')\n')
    return dict(line=lambda self, text: self.put(text + '\n'), body=body, fetch_mail=fetch_mail,
                greeting='* OK ready\n')


def answers(*forms):
    """Each mail's answer as these responses; in them UID, FLAGS, ... stand for the items."""
    def fetch_mail(self, number, m, items):
        have = {i.split(b' ')[0].split(b'[')[0].decode(): i for i in self.fetch_items(m, items)}
        for form in forms:
            parts = [have[word] for word in form.split() if word in have]
            if len(parts) > 1:
                self.put(b'* %d FETCH (' % number + b' '.join(parts) + b')\r\n')
    return dict(fetch_mail=fetch_mail)


CHATTER = ('* OK [ALERT] the disk is nearly full', '* BAD [CLIENTBUG] pipelining is ambiguous', '* NO a warning',
           '* 3 FETCH (FLAGS (\\Seen))', '* 1 FETCH (UID 99 FLAGS () BODY[] {3}\r\nabc)', '* 0 RECENT',
           '* OK [X-ODD "quoted ] and \\" here" {5}\r\n]\r\nxy (] "]")] text', '* [COPYUID 1 2 3] no status',
           '[ALERT] not even a star', '* OK [INPROGRESS ("A3" 454 1000)] still at it', '* VANISHED (EARLIER) 900:950',
           '* FLAGS (\\Seen NonJunk $x)', '* OK', '* OK [UNSEEN 1]', '* XYZZY 1 (a (b "c)" {2}\r\n))) [d]) NIL {0}\r\n',
           '* OK [HIGHESTMODSEQ 5]', '* STATUS other (MESSAGES 5)', '* SEARCH 77 78',
           '* ESEARCH (TAG "x") UID ALL 80:90', 
           '* LIST () "/" {5}\r\nab\r\nc', '* ID ("a" NIL)', '* CAPABILITY IMAP4rev1 \x7f x',
           '* 999 FETCH (UID 5 MODSEQ (7))')


def chatter(*lines):
    """Says all this in front of each line of its own. Of what is meant for one moment only, that:
    LIST not while mailboxes are listed, SEARCH and HIGHESTMODSEQ not while those are asked for."""
    def line(self, text):
        if not self.busy:
            for extra in lines:
                word = extra.split()[1] if ' ' in extra else ''
                if not (word == 'LIST' and self.box is None or '[HIGHESTMODSEQ' in extra and self.box is None
                        or word in ('SEARCH', 'ESEARCH') and 'SEARCH' in self.last):
                    self.put(extra.replace('CAPABILITY IMAP4rev1', 'CAPABILITY ' + self.known()) + '\r\n')
            if self.box:
                self.put('* %d EXISTS\r\n' % len(self.box.mails))
        Session.line(self, text)

    def one(self):
        self.last = self.input.decode(errors='replace') if self.input else ''
        Session.one(self)
    return dict(line=line, busy=False, last='SEARCH')


def authenticate_with_a_bare_plus(self, tag, args):
    self.put('+\r\n')
    self.flush()
    code = self.take_line().strip()
    self.enter(tag, *base64.b64decode(code).decode().split('\0')[1:])


def unknown_numbers(self, name, box):
    have = Session.status_values(self, name, box)
    return dict(have, UIDNEXT=0, UIDVALIDITY=0, HIGHESTMODSEQ=-1, SIZE='9.3736e+06')


def split_search(self, tag, uids, extended):
    for uid in uids:
        self.line('* SEARCH %d' % uid)


def window(n, extended=False):
    """Only the newest n mails: with MESSAGELIMIT (RFC 9738), and UIDFETCH (RFC 9586), as Yahoo."""
    def limited(self, text):
        with self.box.lock:
            uids = [m.uid for m in self.box.mails if text is None or imapd.in_set(text, m.uid, self.box.uidnext - 1)]
        return uids[-n:], '[MESSAGELIMIT %d %d] done' % (n, uids[-n]) if len(uids) > n else 'done'

    def search(self, tag, args):
        m = re.search(r'UID ([\d:*,]+)$', args)
        uids, text = limited(self, m and m.group(1))
        self.search_line(tag, uids, 'RETURN' in args)
        self.ok(tag, text)

    def fetch(self, tag, args):
        words = args.split(' ', 1)
        uids, text = limited(self, words[0])
        if uids:
            self.fetch(imapd.ranges(uids) + ' ' + words[1])
        self.ok(tag, text)

    def fetch_mail(self, number, m, items):
        self.put(b'* %d UIDFETCH (' % m.uid + b' '.join(self.fetch_items(m, items)[1:]) + b')\r\n')
    return dict(cmd_UID_SEARCH=search, cmd_UID_FETCH=fetch, fetch_mail=fetch_mail,
                capabilities=(FULL + ' MESSAGELIMIT=%d UIDONLY' % n).replace(' ESEARCH', ''))


def at_most(n, **odd):
    """A fault if more than n commands are on the wire at a time after the login."""
    def one(self):
        while self.user and self.more(0.02):
            if self.input.count(b'\n') > n:
                self.server.fault('more than %d commands at a time: %r' % (n, self.input))
            if b'\n' in self.input:
                break
        Session.one(self)
    return dict(one=one, **odd)


def only_uid_at_first(self, number, m, items):
    """iCloud now and then: OK, but only UID in it. Asked again, it has the mail."""
    first = not hasattr(self.server, 'seen')
    self.server.seen = True
    if first or 'BODY.PEEK[]' not in items or (m.uid, 'x') in self.__dict__.setdefault('told', set()):
        return Session.fetch_mail(self, number, m, items)
    self.told.add((m.uid, 'x'))
    if m.uid % 3 == 0:
        self.put(b'* %d FETCH (UID %d)\r\n' % (number, m.uid))
    else:
        Session.fetch_mail(self, number, m, items)


def needs_id(self, tag, args):
    if not self.server.lines('^ID '):
        return self.no(tag, 'EXAMINE Unsafe Login. Please contact kefu@188.com for help')
    Session.cmd_EXAMINE(self, tag, args)


def nothing_with_return(self, tag, args):
    if 'RETURN' in args:
        return self.ok(tag)
    Session.cmd_LIST(self, tag, args)


def twice(self, name, box):
    for attributes in ('\\Noinferiors', '\\Noselect'):
        self.line('* LIST (%s) "/" "%s"' % (attributes, name))


def atoms(self, text, octets=None):
    return text if re.match('[A-Za-z0-9]+$', text) else sample.quoted(text)


def quoted_headers(self, name, data):
    if name == b'BODY[]' or len(data) < 3:
        return b'%s NIL' % name if len(data) < 3 else Session.body(self, name, data)
    return b'%s ~{%d+}\r\n%s' % (name, len(data), data)


def refuse_return(self, tag, args):
    if 'RETURN' in args:
        return self.line(tag + ' BAD Command Argument Error. 11')
    Session.cmd_UID_SEARCH(self, tag, args)


def one_by_one(self, tag, args):
    many = re.search('[:,]', args.split()[0]) and 'BODY' in args
    self.line(tag + ' BAD too many mails') if many else Session.cmd_UID_FETCH(self, tag, args)


class Backslash(Mailbox):
    def __init__(self, *args):
        Mailbox.__init__(self, *args, delimiter='\\')


NAMES = ('INBOX', '..', '../../x', 'a/../b', '.', 'a\0', 'x' * 300, 'x' * 299 + 'y', '&Jjo!', '&U,BTFw-&ZeVnLIqe-',
         '&AC8-', '&2D0-', '&', 'a&b', 'Fußball', 'caf\udce9', 'NIL', 'nil', 'a "b" \\c', 'con', 'a:b?<>|*', ' a ',
         'a.b', '~', '{5}', '(', 'A1 OK', '\x1b[31mred', 'tab\there')


def few(n=1, **more):
    return Mailbox(letters(n, 'few%d' % n), **more)


def test_mailboxes_that_cannot_be(t):
    """Names that are refused, and names that would share a file: said, and the others are backed up."""
    def case(*bad, says, fails=1, skips=None, **more):
        return Case(boxes={'INBOX': few(9), **{name: few(1) for name in bad}}, runs=(1, 2, 3), fails=fails,
                    skips=skips or bad, says=says, **more)
    play(t, {
        'nul': case('a\0b', says='NUL'),
        'empty': case('', says='empty'),
        'long': case('x' * 1025, says='1024 octets'),
        'long-literal': case('x' * 1025, says='1024 octets', literals=True),
        'lineend': case('a\r\nA9 LOGOUT', says='line ends.*x0d'),
        'lineend-bare': case('a\r\nA9 LOGOUT', says='line ends', capabilities=BARE),
        'vanished': case('lost', fails=0, says='lost: opening the mailbox: the server says NO .NONEXISTENT. no such mailbox',
                         cmd_EXAMINE=lambda self, tag, args: self.no(tag, '[NONEXISTENT] no such mailbox')
                         if 'lost' in args else Session.cmd_EXAMINE(self, tag, args)),
    })


def test_odd_servers(t):
    """What servers do that is odd but allowed, or not allowed but understandable."""
    flat = {name: few(1 + i) for i, name in enumerate(('INBOX', 'a/b', 'a.b', 'a\\b', '.x'))}
    for box in flat.values():
        box.delimiter = ''
    no_mail = {'INBOX': few(2), 'A': few(0, attributes='\\NoSelect \\HasChildren'), 'A/b': few(3),
               'B': few(0, attributes='\\NonExistent'), 'B/c': few(1)}
    names = {name: few(1 + i % 3) for i, name in enumerate(n for n in NAMES if '\0' not in n)}
    many = {'INBOX': few(3), **{'box %d' % i: few(1) for i in range(60)}}
    play(t, {
        'honest': Case(),
        'bare': Case(capabilities=BARE),
        'octets': Case(segment=1),
        'octets-literals': Case(segment=1, literals=True),
        'literals': Case(literals=True, boxes={'INBOX': few(9), 'a "b"': few(2), 'x/y': few(3)}),
        'barelf': Case(**bare_lf()),
        'uidlast': Case(**answers('FLAGS INTERNALDATE BODY UID')),
        'uidmiddle': Case(**answers('BODY UID INTERNALDATE FLAGS')),
        'dateapart': Case(**answers('UID INTERNALDATE', 'UID FLAGS BODY')),
        'flagsafter': Case(**answers('UID INTERNALDATE BODY', 'UID FLAGS')),
        'bodytwice': Case(**answers('UID FLAGS INTERNALDATE BODY', 'UID FLAGS INTERNALDATE BODY')),
        'nosaslir': Case(capabilities=FULL.replace(' SASL-IR', '')),
        'bareplus': Case(capabilities='IMAP4rev1', cmd_AUTHENTICATE=authenticate_with_a_bare_plus),
        'login': Case(login=''),
        'login8bit': Case(login='', password='pässwörd "\\', account={'username': 'jörg'}),
        'login8bit-bare': Case(login='', capabilities=BARE, password='pässwörd'),
        'plain8bit': Case(password='pässwörd\u3042'),
        'logindisabled': Case(login='LOGINDISABLED AUTH=PLAIN'),
        'preauth': Case(greeting='* PREAUTH [CAPABILITY IMAP4rev1] welcome\r\n', user='x'),
        'nocapability': Case(greeting='* OK ready\r\n', ok=lambda self, tag, text='done': Session.ok(
            self, tag, re.sub(r'\[CAPABILITY.*?\] ', '', text))),
        'unknown': Case(status_values=unknown_numbers, examine_lines=lambda self: (
            self.line('* %d EXISTS' % len(self.box.mails)), self.line('* OK [UIDVALIDITY 0]'),
            self.line('* OK [UIDNEXT 0] x'), self.line('* OK [HIGHESTMODSEQ -1]'))),
        'nothingtold': Case(capabilities=BARE, cmd_STATUS=lambda self, tag, args: self.no(tag, 'no STATUS here'),
                            examine_lines=lambda self: self.line('* %d EXISTS' % len(self.box.mails))),
        'nomodseq': Case(examine_lines=lambda self: (
            self.line('* %d EXISTS' % len(self.box.mails)), self.line('* OK [UIDVALIDITY 7] x'),
            self.line('* OK [UIDNEXT %d] x' % self.box.uidnext), self.line('* OK [NOMODSEQ] x'))),
        'searched': Case(search_line=lambda self, tag, uids, extended: Session.search_line(self, tag, uids, False)),
        'searchsplit': Case(search_line=split_search),
        'searchabsent': Case(capabilities=BARE, boxes={'INBOX': few(0), 'A': few(9)},
                             search_line=lambda self, tag, uids, e: uids and Session.search_line(self, tag, uids, e)),
        'searchlong': Case(capabilities=BARE, search_line=lambda self, tag, uids, e: self.line(
            '* SEARCH' + ' %s' % ' '.join(str(u) for u in uids) * (10 ** 6 // (1 + 3 * len(uids))))),
        'searchmodseq': Case(search_line=lambda self, tag, uids, e: self.line(
            '* SEARCH %s (MODSEQ 917)' % ' '.join(str(u) for u in uids))),
        'flagsrefused': Case(capabilities=BARE, cmd_UID_FETCH=lambda self, tag, args: self.no(tag, 'too much')
                             if args == '1:* (FLAGS)' else Session.cmd_UID_FETCH(self, tag, args),
                             boxes={'INBOX': few(5)}),
        'esearchmore': Case(search_line=lambda self, tag, uids, extended: self.line(
            '* ESEARCH (TAG %s) UID MIN 1 COUNT 5 X (a "b") ALL %s MODSEQ 5' % (tag, imapd.ranges(uids)))),
        'statusspace': Case(status_space=True, capabilities=BARE),
        'atoms': Case(string=atoms, boxes={'INBOX': few(9), 'NIL': few(2), 'nil/NIL': few(3)}),
        'literal8': Case(body=quoted_headers),
        'icloud': Case(fetch_mail=only_uid_at_first),
        'sizes': Case(fetch_mail=only_uid_at_first, fetch_items=lambda self, m, items: [
            i if not i.startswith(b'RFC822') else b'RFC822.SIZE ' + (b'9.3736e+06' if m.uid % 2 else b'3')
            for i in Session.fetch_items(self, m, items)]),
        'allbytes': Case(boxes={'INBOX': Mailbox(letters() + [b'Message-ID: <%d>\r\n\r\n%s\r\n' % (n, bytes(
            range(256)) * n) for n in (1, 300)])}),
        'zimbra': Case(boxes=many, **at_most(20, greeting='* OK a.example Zimbra IMAP4rev1 server ready\r\n',
                                             capabilities='IMAP4rev1 ID LITERAL+')),
        'changedsince': Case(cmd_UID_FETCH=lambda self, tag, args: self.line(tag + ' BAD iPhone?') if 'CHANGED' in args
                             else Session.cmd_UID_FETCH(self, tag, args)),
        'netease': Case(cmd_EXAMINE=needs_id),
        'strato': Case(cmd_LIST=nothing_with_return, boxes={'INBOX': few(9), 'A': few(2)}),
        'courier': Case(list_line=twice, capabilities='IMAP4rev1 UIDPLUS', boxes={'INBOX': few(9), 'A': few(2)}),
        'domino': Case(boxes={n: Backslash(letters(i + 2, n)) for i, n in enumerate(('INBOX', 'a\\b', 'a/b.c'))},
                       delimiter='\\'),
        'flat': Case(boxes=flat, delimiter=''),
        'nomail': Case(boxes=no_mail),
        'names': Case(boxes=names),
        'spelled': Case(boxes={'INBOX': few(9), '&': few(1), '&-': few(2)}),
        'nosearch': Case(cmd_UID_SEARCH=lambda self, tag, args: self.no(tag, 'not now')),
        'names-literals': Case(boxes=names, literals=True),
        'onlysingle': Case(cmd_UID_FETCH=one_by_one, capabilities=BARE, boxes={'INBOX': few(9)}),
        'yahoo': Case(boxes={'INBOX': Mailbox(letters(25))}, **window(10)),
        'chatter': Case(says='the disk is nearly full', **chatter(*CHATTER)),
        'flagsapart': Case(**answers('UID FLAGS INTERNALDATE', 'UID BODY')),
        'esearchempty': Case(search_line=lambda self, tag, uids, extended: Session.search_line(
            self, tag, [] if extended else uids, extended)),
        'esearchrefused': Case(cmd_UID_SEARCH=refuse_return),
        'exchange': Case(boxes={'INBOX': Mailbox(letters()), **{'b%d' % i: few(2) for i in range(4)}}, **at_most(
            1, greeting='* OK The Microsoft Exchange IMAP4 service is ready.\r\n', status_space=True,
            capabilities='IMAP4rev1 SASL-IR UIDPLUS MOVE ID UNSELECT CHILDREN IDLE NAMESPACE LITERAL+')),
        'names-bare': Case(boxes=names, capabilities=BARE),
        'emptyline': Case(**says_when('cmd_LIST', '\r\n \r\n')),
        'deep': Case(**says_when('cmd_LIST', '* XYZZY ' + '(' * 100 + ')' * 100 + '\r\n')),
        'unclosed': Case(**says_when('cmd_LIST', '* XYZZY (a (b)\r\n')),
        'noparentheses': Case(**says_when('cmd_UID_FETCH', '* 1 FETCH UID 1 FLAGS ()\r\n')),
    })


# ---- failures: what can be had is had, what cannot is told, and the next run has it all ----

def at_command(k, act, connections=(1,)):
    """On these connections, do this before the k-th command is answered."""
    def hook(session, tag, name, args):
        session.count = getattr(session, 'count', 0) + 1
        return session.number in connections and session.count == k and act(session, tag) is not None
    return dict(hook=hook)


def once(pattern, act, times=1):
    """The first commands that match are answered by act(session, tag)."""
    left = [times]

    def hook(session, tag, name, args):
        if left[0] > 0 and re.search(pattern, name + ' ' + args):
            left[0] -= 1
            return act(session, tag) or True
    return dict(hook=hook)


def always(pattern, act):
    return once(pattern, act, 10 ** 9)


def asks_for(uid, act):
    """Each command for the body of this mail."""
    def hook(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY.PEEK[]' in args and imapd.in_set(args.split()[0], uid, 99):
            return act(session, tag, args) or True
    return dict(hook=hook)


def no(text):
    return lambda session, tag, args='': session.no(tag, text)


def bad(text):
    return lambda session, tag, args='': session.line(tag + ' BAD ' + text)


def renumber(session, tag):
    """All mails get other UIDs, and the server says so."""
    session.box.renumber()
    session.line('* OK [UIDVALIDITY %d] all is new' % session.box.uidvalidity)
    session.cmd_UID_FETCH(tag, session.server.commands[-1].text[10:])


def drop(how):
    return lambda session, tag, args='': (session.flush(), session.drop(how))


def bye(text='going down', how='close'):
    return lambda session, tag, args='': session.bye(text, how)


def leaves_out(uid):
    """This mail is never in the answer, which is OK."""
    def fetch_mail(self, number, m, items):
        if m.uid != uid or 'BODY.PEEK[]' not in items:
            Session.fetch_mail(self, number, m, items)
    return dict(fetch_mail=fetch_mail)


def leaves_out_once(uid):
    """Only the first answer lacks this mail."""
    left = [uid]

    def fetch_mail(self, number, m, items):
        if m.uid in left and 'BODY.PEEK[]' in items:
            left.clear()
        else:
            Session.fetch_mail(self, number, m, items)
    return dict(fetch_mail=fetch_mail)


def body_of(uid, *text):
    """Instead of the whole mail it sends this."""
    def fetch_items(self, m, items):
        out = Session.fetch_items(self, m, items)
        if m.uid == uid and 'BODY.PEEK[]' in items:
            out[-1:] = text
        return out
    return dict(fetch_items=fetch_items)


def partial_no(session, tag, args):
    """Gmail: the others come, and then NO."""
    uids = imapd.uids_of(args.split()[0])
    if len(uids) > 1:
        uids.remove(5)
        session.fetch(imapd.ranges(uids) + ' ' + args.split(' ', 1)[1])
    session.no(tag, 'Some messages could not be FETCHed (Failure)')


def mails_until(session, tag, args):
    """All in front of UID 5 come, then the line is dead."""
    below = [u for u in imapd.uids_of(args.split()[0]) if u < 5]
    if below:
        session.fetch(imapd.ranges(below) + ' ' + args.split(' ', 1)[1])
    session.put('* 5 FETCH (UID 5 FLAGS () BODY[] {100}\r\nSubject: torn\r\n')
    session.flush()
    session.drop('fin')


def refuse_literals(self):
    """The first command with a literal is refused at once."""
    line = self.take_line()
    self.server.record(imapd.Command(self.number, 0, '', line.decode(), len(line)))
    tag = line.split()[0].decode()
    if line.endswith(b'}\r\n'):
        self.no(tag, 'no literals, please')
    else:
        self.cmd_CAPABILITY(tag, '')
    self.flush()


def test_failures(t):
    """Mails, commands and connections that fail. The next run, by an honest server, must find the rest."""
    def poison(act, **more):
        return Case(runs=(1,), fails=1, lacks=(5,), tries=4, says=r'1 mails .*UID 5$', **act, **more)

    def passing(says=(), runs=(1,), **act):
        return Case(runs=runs, says=says, **act)
    cases = {
        'no': poison(asks_for(5, no('no'))),
        'bad': poison(asks_for(5, bad('no'))),
        'gmail': poison(asks_for(5, partial_no)),
        'missing': poison(leaves_out(5)),
        # Those of the same key are numbered by UID all the same.
        'missing-once': passing(boxes={'INBOX': Mailbox([b'Subject: same\r\n\r\n%d\r\n' % n for n in range(8)])},
                                **leaves_out_once(5)),
        'missing-searched': poison(dict(leaves_out(5), cmd_UID_FETCH=lambda self, tag, args: (
            self.line('* SEARCH 77 2 90 2'), Session.cmd_UID_FETCH(self, tag, args)))),
        'nil': poison(body_of(5, b'BODY[] NIL')),
        'nothing': poison(body_of(5, b'BODY[] ')),
        'empty': poison(body_of(5, b'BODY[] ""')),
        'empty-literal': poison(body_of(5, b'BODY[] {0}\r\n')),
        'closes': poison(asks_for(5, drop('close'))),
        'resets': poison(asks_for(5, drop('rst'))),
        'cuts': poison(asks_for(5, mails_until)),
        'says-bye': poison(asks_for(5, bye('internal error'))),
        'throttled': passing('says NO .THROTTLED. slow down; trying again',
                             **once('^UID_FETCH', no('[THROTTLED] slow down'))),
        'backoff': passing('trying again in [12]', **once('^UID_FETCH', bad(
            'Request is throttled. Suggested Backoff Time: 299 milliseconds'))),
        # More than ten seconds: the worker ends, and another one comes later.
        'place': passing('trying again in 11', **once('^UID_FETCH', bad('Suggested Backoff Time: 9200 milliseconds'))),
        'place-list': passing('trying again in 11',
                              **once('^LIST', no('Suggested Backoff Time: 9200 milliseconds'), 2)),
        'backoff-login': passing('trying again in [12]',
                                 **once('^AUTH', no('Suggested Backoff Time: 99 milliseconds'))),
        'unavailable': passing('UNAVAILABLE', **once('^AUTH', no('[UNAVAILABLE] try again later'))),
        'limit': passing('LIMIT', **once('^CAPABILITY|^AUTH', no('[LIMIT] Rate limit hit.'))),
        'inuse': passing('INUSE', **once('^EXAMINE', no('[INUSE] another has it'))),
        'inuse-bye': passing('ended the connection: closing; service busy',
                             **once('^EXAMINE', bye('closing; service busy'))),
        'wrong': Case(runs=(1,), tries=1, fails=1, says='AUTHENTICATIONFAILED', skips=('INBOX',),
                      **always('^AUTH', no('[AUTHENTICATIONFAILED] wrong password'))),
        'wrong-user': Case(runs=(1,), tries=1, fails=1, says='never heard of', skips=('INBOX',), login='',
                           password='ü', enter=lambda self, tag, *x: self.no(tag, 'never heard of')),
        'wrong-literal': Case(runs=(1,), tries=1, fails=1, says='no literals', skips=('INBOX',), login='',
                              password='ü', one=refuse_literals),
        'wrong-later': Case(runs=(1,), tries=1, fails=1, says='AUTHENTICATIONFAILED', skips=('INBOX',),
                            **always('^AUTH', no('[AUTHENTICATIONFAILED] wrong, please try again later'))),
        'yahoo-poison': poison(asks_for(5, no('[UNAVAILABLE] UID FETCH Server error - Please try again later'))),
        'exchange-poison': poison(asks_for(5, no('Server Unavailable. 15'))),
        'disabled': Case(runs=(1,), tries=1, fails=1, says='LOGINDISABLED', skips=('INBOX',), login='LOGINDISABLED'),
        'poison-header': Case(runs=(2,), fails=1, lacks=(13,), says='UID 13', **always(
            '^UID_FETCH (13|1?[0-9]:1[34]) .*BODY', drop('rst'))),
        'expunge-told': Case(runs=(1,), **once('^UID_SEARCH', lambda session, tag: (
            session.box.expunge(7), session.line('* 7 EXPUNGE'), session.cmd_UID_SEARCH(tag, 'RETURN (ALL) ALL')))),
        'exists-told': Case(runs=(1,), **once('^UID_SEARCH', lambda session, tag: (
            session.search_line(tag, session.search_uids(), True), session.box.add(b'Message-ID: <late@x>\r\n\r\nx'),
            session.line('* 13 EXISTS'), session.ok(tag)))),
        'expunged': Case(runs=(1,), **once('^UID_FETCH 6', lambda session, tag: (
            session.box.expunge(7, 12), session.cmd_UID_FETCH(tag, session.server.commands[-1].text[10:])))),
    }
    cases.update({
        'renumbered': passing('UIDVALIDITY', **once('^UID_FETCH 6', renumber)),
        'renumbered-later': passing('UIDVALIDITY', runs=(2,), **once('^UID_FETCH 13:14 .*MESSAGE-ID', renumber)),
        'tag-once': passing('begins with "B7"', **once('^UID_FETCH 6', lambda s, tag: s.line('B7 OK'))),
        'huge-once': passing('announces a literal', **once('^UID_FETCH 6', lambda s, tag: s.line(
            '* 7 FETCH (UID 7 BODY[] {99999999999}'))),
        'silence-once': passing('nothing for 4 seconds', **once('^UID_FETCH 6', drop('silence'))),
        'newest': Case(boxes={'INBOX': Mailbox(sample.many(1003))}, runs=(2,), keeps=True, flag=-3, **newest(1000)),
        'newest-renumbered': Case(boxes={'INBOX': Mailbox(sample.many(1003))}, runs=(2,), keeps=True, flag=-3, **dict(
            newest(1000), setup=lambda self: self.server.boxes['INBOX'].uidvalidity == 1000 and
            self.server.boxes['INBOX'].renumber())),
    })
    for k in range(1, 9):
        cases['bye-%d' % k] = passing('ended the connection: going down', **at_command(k, bye()))
    cases['bye-0'] = passing('ended the connection: not now', greet=lambda self: Session.greet(self) if self.number > 1
                             else self.bye('not now'))
    play(t, cases, retries=2)


def test_one_connection_is_all_that_the_server_takes(t):
    """The second worker is turned away: the first does the work of both."""
    boxes = {name: Mailbox(letters(12, name)) for name in ('INBOX', 'A', 'B', 'C', 'D')}
    for how in (no('[LIMIT] Maximum number of connections exceeded'), bye('too many'), drop('rst')):
        def enter(self, tag, user, password):
            with self.server.lock:
                full = any(s.user == user for s in self.server.inside)
                self.user = user
            return how(self, tag) if full else Session.enter(self, tag, user, password)
        server = Server(boxes, session=dict(enter=enter, lag=0.05))
        t.cleanups.append(server.stop)
        t.dest += 'x'
        account = {'email': 'a@x', 'host': '127.0.0.1', 'port': server.port, 'password': 'secret'}
        status, said, err = run(t, [account], retries=0, processes_per_account=2)
        assert status == 0 and len(server.sessions) == 2, (len(server.sessions), err)
        for name, box in boxes.items():
            assert not archive.compare(os.path.join(t.dest, 'a@x', name + '.mbox'), held(box))


def test_a_connection_that_was_given_up_is_not_tried_again(t):
    """Though there are mailboxes that nobody has taken; and it is said once, of no mailbox."""
    class Shy(Session):
        def enter(self, tag, user, password):
            if self.number > 1:
                return no('[LIMIT] Maximum number of connections exceeded')(self, tag)
            Session.enter(self, tag, user, password)

        def cmd_UID_FETCH(self, tag, args):
            time.sleep(0.02)
            Session.cmd_UID_FETCH(self, tag, args)
    boxes = {name: Mailbox(letters(3, name)) for name in ['INBOX'] + ['B%d' % i for i in range(40)]}
    server = Server(boxes, session=Shy)
    t.cleanups.append(server.stop)
    account = {'email': 'a@x', 'host': '127.0.0.1', 'port': server.port, 'password': 'secret'}
    status, said, err = run(t, [account], retries=0, processes_per_account=2)
    assert status == 0 and len(server.sessions) == 2, (len(server.sessions), err)
    for name, box in boxes.items():
        assert not archive.compare(os.path.join(t.dest, 'a@x', name + '.mbox'), held(box))


# ---- lies ----

def endless(what, when='greet'):
    """Says this without end: as a greeting, or instead of an answer to a command."""
    def forever(self, *args):
        if when == 'fetch':   # behind the honest answer
            Session.fetch(self, *args)
        self.put('* OK [CAPABILITY %s] x\r\n' % self.known() if when == 'greet' else '')
        while True:
            self.put(what)
    return {when: forever}


def says_when(when, what):
    """Says this in front of the answer to a command."""
    def method(self, *args):
        self.put(what)
        getattr(Session, when)(self, *args)
    return {when: method}


def lists(count, uids):
    """EXISTS and what is listed are these, whatever there is."""
    def examine_lines(self):
        self.line('* %d EXISTS' % count(self.box))
        self.line('* OK [UIDVALIDITY %d] valid' % self.box.uidvalidity)
        self.line('* OK [UIDNEXT %d] next' % self.box.uidnext)

    def search_line(self, tag, have, extended):
        text = uids(self.box)
        self.line('* ESEARCH (TAG "%s") UID ALL %s' % (tag, text) if extended else '* SEARCH ' + text.replace(',', ' '))

    def fetch(self, args):
        if args != '1:* (UID)':
            return Session.fetch(self, args)
        for uid in imapd.uids_of(uids(self.box)):
            self.line('* 1 FETCH (UID %d)' % uid)
    return dict(examine_lines=examine_lines, search_line=search_line, fetch=fetch)


def newest(n):
    """The server shows no more than these, and does not say so."""
    def method(name):
        def shown(self, *args):
            whole = self.box
            self.box = Mailbox(uidvalidity=whole.uidvalidity)
            self.box.mails, self.box.uidnext, self.box.modseq = whole.mails[-n:], whole.uidnext, whole.modseq
            getattr(Session, name)(self, *args)
            self.box = whole
        return shown

    def status_values(self, name, box):
        return dict(Session.status_values(self, name, box), MESSAGES=min(n, len(box.mails)))
    return dict(status_values=status_values, **{x: method(x) for x in ('examine_lines', 'search_uids', 'fetch')
                                                if x != 'search_uids'},
                search_uids=lambda self: [m.uid for m in self.box.mails[-n:]])


def uids(box):
    return imapd.ranges([m.uid for m in box.mails])


def test_a_line_that_breaks_at_every_mail(t):
    """Then it is not the mails: what is left out one after the other comes to an end."""
    with Server({'INBOX': few(15)}) as server:
        server.hook = lambda session, tag, name, args: 'BODY.PEEK[]' in args and session.drop('rst')
        t.config(t.account(server, mode='plain', ssl=False), retries=2)
        said = t.backup(status=1).err
        assert said.count('left out in this run') <= 6 and len(server.sessions) < 16, said
        server.hook = None
        t.backup()


def test_mails_in_a_row_that_break_the_line(t):
    """Each is left out, although the retries would not do for all of them; what is behind them is stored."""
    boxes = {'INBOX': Mailbox(list(sample.many(15)))}   # each with a Message-ID: they are asked for in order
    with Server(boxes) as server:
        def hook(session, tag, name, args):
            if 'BODY.PEEK[]' in args and any(imapd.in_set(args.split()[0], uid, 15) for uid in (3, 4, 5, 6)):
                session.drop('rst')
        server.hook = hook
        t.config(t.account(server, mode='plain', ssl=False), retries=2)
        said = t.backup(status=1).err
        assert said.count('left out in this run') == 4 and 'INBOX: 11 new' in said, said
        server.hook = None
        assert 'INBOX: 4 new' in t.backup().err


def test_lies(t):
    """What no server may say. Memory stays small, nothing is marked gone, the message says what it was."""
    def lie(says, runs=(1,), skips=('INBOX',), **more):
        return Case(runs=runs, fails=1, says=says, skips=skips, **more)

    def late(says, **more):
        return Case(runs=(2,), fails=1, says=says, keeps=True, **more)
    flood = 'more than 16777216 octets that nobody asked for'
    many = 'more than 1000000 mails'
    fetched = 'cmd_UID_FETCH'
    play(t, {
        'http': lie('begins with "HTTP/1.1"', greeting='HTTP/1.1 400 Bad Request\r\n\r\n'),
        'nothing': lie('connection closed by the server', greet=lambda self: self.drop('close')),
        'wrongtag': lie('begins with "B7"', **says_when('cmd_LIST', 'B7 OK done\r\n')),
        'oldtag': lie('begins with "A1"', **says_when('cmd_LIST', 'A1 OK done\r\n')),
        'futuretag': lie('begins with "A99"', **says_when('cmd_LIST', 'A99 OK done\r\n')),
        'neither': lie('sent MAYBE where OK', ok=lambda self, tag, text='': self.line(tag + ' MAYBE ' + text)),
        'plus': lie('continuation request', **says_when('cmd_LIST', '+ go on\r\n')),
        'controls': lie(r'\\x1b\[2J\\x07\\x7f\\xc2\\x9b\\xff', cmd_AUTHENTICATE=lambda self, tag, args:
                        self.no(tag, '[AUTHENTICATIONFAILED] \x1b[2J\x07\x7f\x9b\udcff\0')),
        'controls-alert': Case(says=r'server says: \\x1b\]0;title\\x07', runs=(1,), **says_when(
            'cmd_LIST', '* OK [ALERT] \x1b]0;title\x07\r\n')),
        'controls-tag': lie(r'begins with "\\x1b"', **says_when('cmd_LIST', '\x1b[31mA1 OK x\r\n')),
        'deep-list': lie('parentheses|where', **says_when('cmd_LIST', '* LIST ((((' + '(' * 100 + '\r\n')),
        'nolength': lie('whose name is empty', skips=(), **says_when('cmd_LIST', '* LIST () "/" {}\r\n')),
        'negative': Case(fails=1, says='literal without a length', runs=(1,), skips=('INBOX',), **says_when(
            fetched, '* 1 FETCH (UID 1 BODY[] {-1}\r\n')),
        'overflow': lie('literal of 99999999999999999999 octets', **says_when(
            'cmd_LIST', '* LIST () "/" {99999999999999999999}\r\n')),
        'hugename': lie('more than 16777216 octets', cmd_LIST=lambda self, tag, args: (
            self.put('* LIST () "/" {4294967295}\r\n'), endless('x' * 9999, 'x')['x'](self))),
        'hugeskip': lie(flood, **says_when('cmd_LIST', '* XYZZY {4294967295}\r\n')),
        'huge': Case(runs=(1,), fails=1, skips=('INBOX',), says='literal of 4294967296 octets',
                     **says_when(fetched, '* 1 FETCH (UID 1 BODY[] {4294967296}\r\n')),
        'cutliteral': lie('nothing for 2 seconds', cmd_UID_FETCH=lambda self, tag, args: self.put(
            '* 1 FETCH (UID 1 BODY[] {4000}\r\nSubject: x\r\n')),
        'flood': lie(flood, **endless('* OK still here\r\n')),
        'flood-alert': lie(flood, **endless('* OK [ALERT] buy more space\r\n')),
        'flood-line': lie(flood, **endless('x' * 1000)),
        'flood-list': lie(flood, **endless('* LIST () "/" INBOX\r\n', 'cmd_LIST')),
        'flood-status': lie(flood, **endless('* STATUS INBOX (MESSAGES 1)\r\n', 'cmd_LIST')),
        'flood-search': lie(flood, cmd_UID_SEARCH=lambda self, tag, args: (
            self.put('* SEARCH'), endless(' 1 2' * 999, 'x')['x'](self))),
        'flood-fetch': lie(flood, **endless('* 1 FETCH (UID 99 BODY[] {20}\r\n01234567890123456789)\r\n', fetched)),
        'flood-uidlast': lie(flood, **endless('* 1 FETCH (BODY[] {99}\r\n%s UID 99)\r\n' % ('x' * 99), fetched)),
        'flood-same': lie(flood, boxes={'INBOX': Mailbox(letters())}, skips=(), lacks=range(6, 13), **endless(
            '* 1 FETCH (UID 1 BODY[] {20}\r\n01234567890123456789)\r\n', 'fetch')),
        'flood-flags': late(flood, lacks=(13, 14), **endless('* 1 FETCH (UID 1 FLAGS ())\r\n' * 99, 'fetch')),
        'flood-bodies': late(flood, lacks=(13, 14), **endless(
            '* 1 FETCH (UID 1 FLAGS () BODY[] {99999}\r\n%s)\r\n' % ('x' * 99999), 'fetch')),
        'everything': lie(many, **lists(lambda box: 12, lambda box: '1:4294967295')),
        'millions': lie(many, **lists(lambda box: 12999987, lambda box: ','.join(
            '%d:%d' % (k * 1000000 + 1, k * 1000000 + 999999) for k in range(13)))),
        'esearch-closed': lie('the server has 12 mails but lists 1: none is marked', skips=(), **dict(
            lists(lambda box: 12, lambda box: '1'), search_line=lambda self, tag, uids, e: self.line('* ESEARCH (TAG "x")) UID ALL 1'))),
        'zero': lie('has 12 mails but lists 1: none is marked', skips=(), **lists(lambda box: 12, lambda box: '0,1')),
        'toobig': lie('has 12 mails but lists 0: none is marked', skips=(), **lists(lambda box: 12, lambda box: '4294967296')),
        'more': late('the server has 16 mails but lists 13: none is marked', **lists(
            lambda box: len(box.mails) + 3, uids)),
        'less': late('the server has 11 mails but lists 13: none is marked', **lists(
            lambda box: len(box.mails) - 2, uids)),
        'partial': late('but lists 3: none is marked', lacks=(13, 14), **lists(
            lambda box: len(box.mails), lambda box: '1,3,4')),
        'nolist': lie('lists no mailbox', cmd_LIST=lambda self, tag, args: self.ok(tag)),
        'norights': lie('says NO no rights', cmd_LIST=lambda self, tag, args: self.no(tag, 'no rights')),
        'silent-greeting': lie('nothing for 2 seconds', greet=lambda self: self.drop('silence')),
        'silent-login': lie('nothing for 2 seconds', **at_command(1, drop('silence'))),
        'silent-fetch': lie('nothing for 2 seconds', **at_command(6, drop('silence'))),
    }, retries=0, timeout=2)


# ---- cut lines ----

def accounts_at(t, port, n, **more):
    return [dict({'email': 'a%d@x' % k, 'host': '127.0.0.1', 'port': port, 'password': 'secret',
                  'processes_per_account': 1}, **more) for k in range(n)]


def all_there(t, boxes, accounts):
    for account in accounts:
        for name, box in boxes.items():
            complaints = archive.compare(os.path.join(t.dest, account['email'], name + '.mbox'), held(box))
            assert not complaints, (account['email'], complaints)


def test_a_server_that_never_comes_back(t):
    server = Server({'INBOX': few(5)})
    t.cleanups.append(server.stop)
    relay = Relay(server.port, lambda k: (600, 'rst') if k == 1 else (0, 'fin') if k == 2 else (0, 'silence'))
    t.cleanups.append(relay.stop)
    status, said, err = run(t, accounts_at(t, relay.port, 1), retries=2, timeout=1)
    assert status == 1 and relay.count == 3 and '1 FAILED' in err, err


def test_servers_that_drip(t):
    """Each octet comes in time, and yet there is no end to it; one that is only slow is waited for."""
    def slowly(when, octets, seconds):
        def method(self, *args):
            self.flush()
            getattr(Session, when)(self, *args)
            data, self.output = self.output, b''
            for at in range(0, len(data), octets):
                self.put(data[at:at + octets])
                self.flush()
                time.sleep(seconds)
        return {when: method}
    odd = {'greeting': slowly('greet', 1, .3), 'mail': slowly('fetch', 1, .3), 'slow': slowly('fetch', 20, .3)}
    boxes, accounts = {'INBOX': Mailbox([b'Message-ID: <a@x>\r\n\r\n' + b'x' * 2000 + b'\r\n'])}, []
    for name, session in odd.items():
        for tls in (False, True):
            server = Server(boxes, certificate=t.certs.good, tls=tls, session=session)
            t.cleanups.append(server.stop)
            accounts.append(dict(accounts_at(t, server.port, 1, ssl=tls, ca_file=t.certs.ca)[0],
                                 email='%s%d@x' % (name, tls)))
    status, said, err = run(t, accounts, limit=200, retries=0, timeout=1)
    for account in accounts:
        slow = 'slow' in account['email']
        assert slow != ('less than 16 octets a second' in ''.join(said[account['email']])), err
    all_there(t, boxes, accounts[-2:])


def test_round_trips_are_few(t):
    """On a slow line the next command is on its way before the answer to the last one has come."""
    boxes = {'INBOX': Mailbox(letters(200)), **{'b%d' % i: few(2) for i in range(10)}}
    server = Server(boxes, session=dict(lag=0.01))
    t.cleanups.append(server.stop)
    account = {'email': 'a0@x', 'host': '127.0.0.1', 'port': server.port, 'password': 'secret'}

    def waits(**more):
        server.forget()
        status, said, err = run(t, [account], processes_per_account=1, **more)
        assert status == 0 and not server.faults, (err, server.faults)
        all_there(t, boxes, [account])
        return server.waits()
    # Login, list, a mailbox each; 40 batches of mails must not be 40 waits.
    first = waits()
    assert first <= 24, (first, server.commands)
    assert waits() <= 4
    for box in boxes.values():
        m = sample.mail(random.Random(first), 'new', message_id=True)
        box.add(m.data, m.flags, m.when)
    assert waits() <= 4 + 3 * len(boxes)


def test_a_listing_with_a_million_gaps(t):
    """What it takes is bounded, also where no set of ranges is short."""
    server = Server({'INBOX': few(5)}, session=lists(lambda box: 1200000, lambda box: ','.join(
        str(u) for u in range(1, 2400000, 2))))
    t.cleanups.append(server.stop)
    status, said, err = run(t, accounts_at(t, server.port, 1), mails=10 ** 6, retries=0)
    assert status == 1 and 'more than 1000000 mails' in err, err


def test_long_pauses(t):
    """A server gets the time that it asks for, up to 15 minutes; a signal ends even such a run at once."""
    texts = {'quota': ('[OVERQUOTA] Account exceeded command or bandwidth limits.', 60, 60),
             'backoff': ('Request is throttled. Suggested Backoff Time: 299961 milliseconds', 300, 340),
             'forever': ('Suggested Backoff Time: 99999999 milliseconds', 900, 900)}
    accounts = []
    for name, (text, _, _) in texts.items():
        server = Server({'INBOX': few(5)}, **once('^UID_FETCH', no(text), 99))
        t.cleanups.append(server.stop)
        accounts.append(dict(accounts_at(t, server.port, 1)[0], email=name + '@x'))
    t.config(*accounts)
    process = subprocess.Popen([PROGRAM, t.path], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        said = [process.stderr.readline().decode() for _ in texts]
        process.terminate()
        said += [line.decode() for line in process.stderr]
        assert process.wait(30) == 1, said
    finally:
        process.kill()
    for name, (text, low, high) in texts.items():
        m = re.search(r'%s@x: .*%s; trying again in ([\d.]+) s' % (name, re.escape(text[-20:])), ''.join(said))
        assert m and low <= float(m.group(1)) <= high, (name, said)


def mangled_sessions(t, seed, n):
    """Octets of the server's are changed, lost, doubled at random. Nothing may crash, hang, grow or leave an
    archive that cannot be read."""
    print('seed', seed)
    rng = random.Random(seed)
    boxes = {'INBOX': Mailbox(letters(8)), 'a "b"': few(3)}
    server = Server(boxes, session=dict(segment=400))
    bare = Server(boxes, session=dict(segment=400, capabilities=BARE, literals=True))
    tokens = [b'(', b')', b'{9}\r\n', b'{99}\r\n', b'"', b'\0', b'\r\n', b' ', b'* ', b'NIL', b'0', b'4294967295',
              b'[', b']', b'\\', b'A5 ', b'UID ', b'\xff', b'\x7f', b':', b',', b'+ ']

    def mangle(data):
        if rng.random() < 0.3:
            at, length = rng.randrange(len(data)), rng.randrange(1, 20)
            put = rng.choice((b'', rng.choice(tokens), rng.randbytes(1), data[at:at + length] * 2))
            data = data[:at] + put + data[at + rng.randrange(length):]
        return data
    relays = [Relay(s.port, mangle=mangle) for s in (server, bare)]
    for s in (server, bare, *relays):
        t.cleanups.append(s.stop)
    accounts = []
    for k in range(n):
        accounts += accounts_at(t, relays[k % 2].port, 1)
        accounts[-1]['email'] = 'a%d@x' % k
    for _ in range(2):
        run(t, accounts, retries=0, timeout=1)
    for relay in relays:
        relay.mangle = None
    status, said, err = run(t, accounts, retries=0)
    assert status in (0, 1), err
    for folder, _, files in os.walk(t.dest):
        for name in files:
            if name.endswith('.mbox'):
                archive.read(os.path.join(folder, name))


def test_mangled_sessions(t):
    mangled_sessions(t, int(time.time()), 100)


def test_headers_refused_where_uidvalidity_is_new(t):
    """Then whole mails tell what is stored: none is stored twice, and the flags are those of today."""
    for number, duplicates in enumerate((False, True)):
        box = Mailbox(letters() + letters()[:5])
        with Server({'INBOX': box}) as server:
            t.config(dict(t.account(server, mode='plain', ssl=False), email='%d@x' % number),
                     keep_duplicates=duplicates)
            t.backup()
            server.hook = lambda session, tag, name, args: 'HEADER.FIELDS' in args and session.no(tag, 'not now')
            box.renumber()
            for m in box.mails:
                box.flag(m.uid, '\\Flagged')
            t.backup()
            complaints = archive.compare(os.path.join(t.archive('%d@x' % number), 'INBOX.mbox'), held(box), duplicates)
            assert not complaints, complaints


def test_flags_refused_are_asked_for_again(t):
    """The listing comes another way then, but does not tell flags: the next run must not find the mailbox without news."""
    box = Mailbox(letters())
    for capabilities in FULL.replace(' CONDSTORE', ''), FULL:
        with Server({'INBOX': box}, session={'capabilities': FULL.replace(' CONDSTORE', '')}) as server:
            t.config(t.account(server, mode='plain', ssl=False))
            t.backup()
            box.add(next(sample.many(1, len(capabilities))).data)
            for m in box.mails:
                box.flag(m.uid, '\\Flagged \\Seen' if '\\Answered' in m.flags else '\\Answered')
            server.session = type('Changed', (Session,), {'capabilities': capabilities})
            server.hook = lambda session, tag, name, args: args == '1:* (FLAGS)' and session.no(tag, 'not now')
            t.backup()
            server.hook = None
            t.backup()
            complaints = archive.compare(t.mbox(), held(box))
            assert not complaints, complaints


def test_changed_flags_refused_where_uidvalidity_is_new(t):
    """They are of no use there, for no UID is bound: nothing else is asked for in their place."""
    box = Mailbox(letters())
    with Server({'INBOX': box}) as server:
        t.config(t.account(server, mode='plain', ssl=False))
        t.backup()
        server.hook = lambda session, tag, name, args: (
            'CHANGEDSINCE' in args and (session.line(tag + ' BAD iPhone?') or True))
        for number in range(2):
            box.renumber(box.uidvalidity + 1)
            box.flag(box.mails[number].uid, '\\Flagged')
            t.backup()
            complaints = archive.compare(t.mbox(), held(box))
            assert not complaints, complaints
        asked = [c.text for c in server.commands if '(FLAGS)' in c.text]
        assert len(asked) == 2 and all('CHANGEDSINCE' in a for a in asked), asked


def test_a_dry_run_knows_a_duplicate(t):
    """One that is new will be left out, however many there are: it counts as none of the mails to be fetched."""
    box = few(3)
    with Server({'INBOX': box}) as server:
        t.config(t.account(server, mode='plain', ssl=False))
        t.backup()
        for k in 0, 1, 1, 2, 0:
            box.add(box.mails[k].data)
        box.expunge(3)
        box.add(next(sample.many(1, 5)).data)
        before = archive.digests(t.dest)
        got = t.backup('-n')
        assert '1 would be fetched, 0 gone' in got.err and '4 duplicates left out' in got.err, got.err
        got = t.backup('--verify', '--online')
        assert 'the server has 1 new mails, 0 have gone; 3 compared' in got.err, got.err
        assert archive.digests(t.dest) == before
        got = t.backup()
        assert '1 new, 0 gone' in got.err and '4 duplicates left out' in got.err, got.err


def test_a_comparison_gives_up(t):
    """Nothing of it lasts from one connection to the next: mails that were told again are no progress."""
    box = few(40)
    with Server({'INBOX': box}) as server:
        t.config(t.account(server, mode='plain', ssl=False), retries=2, header_batch_size=5)
        t.backup()
        met, begun = [], len(server.sessions)

        def hook(session, tag, name, args):
            met.append(session.number)
            return name == 'UID_FETCH' and met.count(session.number) > 8 and (session.drop('rst') or True)
        server.hook = hook
        got = t.backup('--verify', '--online', status=1)
        assert len(server.sessions) - begun <= 6, (len(server.sessions) - begun, got.err)


def test_a_limit_that_never_ends(t):
    """The same MESSAGELIMIT again and again: it is no use to ask on, for UIDs or for flags."""
    box = few(30)
    for command in 'UID_SEARCH', 'UID_FETCH':
        def hook(session, tag, name, args):
            if name == command and (name == 'UID_SEARCH' or '(FLAGS)' in args):
                return session.line(tag + ' OK [MESSAGELIMIT 10 5] more') or True
        with Server({'INBOX': box}, hook=hook if command == 'UID_SEARCH' else None) as server:
            t.config(t.account(server, mode='plain', ssl=False))
            t.backup(status=1 if server.hook else 0)
            server.hook = hook
            box.flag(box.mails[-1].uid, '\\Flagged')
            got = t.backup(status=1)
            assert 'tells nothing of UIDs below 5' in got.err, got.err
            assert sum('5 (FLAGS)' in c.text or 'SEARCH' in c.text for c in server.commands) < 12


def test_a_limit_that_gets_lower_for_ever(t):
    left = [10 ** 6]

    def hook(session, tag, name, args):
        left[0] -= 1
        return name == 'UID_SEARCH' and (session.line(tag + ' OK [MESSAGELIMIT 1 %d] more' % left[0]) or True)
    with Server({'INBOX': few(30)}, hook=hook) as server:
        t.config(t.account(server, mode='plain', ssl=False))
        assert 'tells nothing of UIDs below' in t.backup(status=1).err and len(server.commands) < 5000
