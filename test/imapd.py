"""A scripted IMAP server: a small, honest IMAP4rev1 server in memory, each part of which a test can
make dishonest.

    box = Mailbox(mails=[data, ...])            mails with UIDs 1, 2, ...
    with Server({'INBOX': box}, hook=...) as server:
        ... server.port ...
        server.lines()                          what clients sent, verbatim

A test overrides behaviour with a subclass of Session (a method cmd_NAME for each command, greet,
fetch_items, ...), or with hook(session, tag, name, args), called before each command; what it
returns, if true, means that it has answered. One thread serves one connection.
"""
import base64
import re
import select
import socket
import ssl
import struct
import threading
import time

import sample


class Gone(Exception):
    """The connection is over."""


class Mail:
    __slots__ = 'uid', 'data', 'flags', 'when', 'modseq'

    def __init__(self, uid, data, flags=(), when=sample.T0, modseq=1):
        self.uid, self.data, self.flags, self.when, self.modseq = uid, data, set(flags), when, modseq


class Mailbox:
    """attributes: of LIST. lock: held while it is read or changed."""

    def __init__(self, mails=(), uidvalidity=1000, attributes='\\HasNoChildren', delimiter='/'):
        self.uidvalidity, self.attributes, self.delimiter = uidvalidity, attributes, delimiter
        self.mails, self.uidnext, self.modseq = [], 1, 1
        self.lock = threading.RLock()
        for m in mails:
            if isinstance(m, sample.Mail):
                self.add(m.data, m.flags, m.when)
            else:
                self.add(m)

    def add(self, data, flags='', when=sample.T0, uid=None):
        with self.lock:
            self.uidnext = max(self.uidnext, uid or 0)
            self.modseq += 1
            self.mails.append(Mail(self.uidnext, data, flags.split(), when, self.modseq))
            self.uidnext += 1
            return self.uidnext - 1

    def inside(self, text):
        """[(sequence number, Mail)] of the UIDs in '1:5,9:*'; what is not asked for costs nothing."""
        with self.lock:
            mails, out, done = self.mails, [], 0
            for low, high in sorted(spans(text, mails[-1].uid if mails else 0)):
                at, end = done, len(mails)
                while at < end:
                    middle = (at + end) // 2
                    at, end = (middle + 1, end) if mails[middle].uid < low else (at, middle)
                for done in range(at, len(mails) + 1):
                    if done == len(mails) or mails[done].uid > high:
                        break
                    out.append((done + 1, mails[done]))
            return out

    def mail(self, uid):
        return next(m for m in self.mails if m.uid == uid)

    def expunge(self, *uids):
        with self.lock:
            self.modseq += 1
            self.mails = [m for m in self.mails if m.uid not in uids]

    def flag(self, uid, flags):
        with self.lock:
            self.modseq += 1
            self.mail(uid).flags, self.mail(uid).modseq = set(flags.split()), self.modseq

    def renumber(self, uidvalidity=None):
        """Another UIDVALIDITY and other UIDs, the same mails."""
        with self.lock:
            self.uidvalidity = uidvalidity or self.uidvalidity + 1
            for m in self.mails:
                m.uid = self.uidnext
                self.uidnext += 1


FULL = ('IMAP4rev1 SASL-IR ID ENABLE LITERAL+ ESEARCH LIST-EXTENDED LIST-STATUS STATUS=SIZE CONDSTORE '
        'UIDPLUS UNSELECT SPECIAL-USE')
BARE = 'IMAP4rev1'


class Command:
    """One command as it came. text: without tag, line ends and literals inside as they were."""

    def __init__(self, connection, when, tag, text, longest):
        self.connection, self.when, self.tag, self.text, self.longest = connection, when, tag, text, longest

    def __repr__(self):
        return '%d %s %s' % (self.connection, self.tag, self.text)


class Session:
    """One connection. Class attributes are defaults that a subclass may change."""
    capabilities = FULL          # after login, and before it with what `login` says
    login = 'AUTH=PLAIN'         # further capabilities before login
    greeting = '* OK [CAPABILITY %s] ready\r\n'
    literals = False             # write every string as a literal, mailbox names too
    segment = 0                  # octets a write to the socket, 0: as many as there are
    cut = None                   # (octets, 'rst', 'fin' or 'silence'): what happens after so many
    lag = 0                      # seconds to wait when nothing is there to be read: counts round trips
    prefix, delimiter = '', '/'  # of the personal namespace, where NAMESPACE is offered
    status_space = False         # a blank at the end of STATUS answers, as Exchange writes it

    def __init__(self, server, sock, number):
        self.server, self.raw, self.sock, self.number = server, sock, sock, number
        self.tls = self.user = self.box = self.name = None
        self.input = self.output = b''
        self.sent = self.waits = 0
        self.state, self.hooked = 'greeting', server.hook
        self.setup()

    def setup(self):
        """For subclasses: the connection is there, nothing is sent."""

    # -- octets --

    def context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server.certificate)
        return context

    def start_tls(self):
        self.sock = self.context().wrap_socket(self.raw, server_side=True)
        self.tls = True

    def put(self, data):
        """Queue octets or text; they go out with flush()."""
        self.output += data.encode('utf-8', 'surrogateescape') if isinstance(data, str) else data
        if len(self.output) > 1 << 16:
            self.flush()

    def line(self, text):
        self.put(text + '\r\n')

    def flush(self):
        data, self.output = self.output, b''
        cut = self.cut is not None and self.sent + len(data) >= self.cut[0]
        if cut:
            data = data[:self.cut[0] - self.sent]
        self.sent += len(data)
        try:
            if self.segment:
                for at in range(0, len(data), self.segment):
                    self.sock.sendall(data[at:at + self.segment])
            else:
                self.sock.sendall(data)
        except OSError:
            raise Gone
        if cut:
            self.drop(self.cut[1])

    def drop(self, how):
        """End the connection: 'rst'; 'fin' without TLS's goodbye; 'close' with it; 'silence'."""
        if how == 'silence':
            try:
                while self.sock.recv(1 << 16):
                    pass
            except OSError:
                pass
        elif how == 'rst':
            self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            if self.tls:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        elif how == 'fin':
            try:
                self.sock.shutdown(socket.SHUT_WR)
                self.sock.settimeout(5)
                while self.sock.recv(1 << 16):
                    pass
            except OSError:
                pass
        elif how == 'close' and self.tls:
            try:
                self.sock.unwrap()
            except (OSError, ValueError):
                pass
        raise Gone

    def more(self, seconds=0):
        """Is there input, or does some come within this time?"""
        if self.input:
            return True
        self.sock.settimeout(max(seconds, 0.001))
        try:
            got = self.sock.recv(1 << 16)
        except (TimeoutError, socket.timeout, ssl.SSLWantReadError):
            return False
        except OSError:
            raise Gone
        finally:
            self.sock.settimeout(None)
        if not got:
            raise Gone
        self.input += got
        return True

    def need(self, found):
        """Read until found(self.input) is not None; that."""
        while True:
            at = found(self.input)
            if at is not None:
                return at
            try:
                got = self.sock.recv(1 << 16)
            except OSError:
                got = b''
            if not got:
                raise Gone
            self.input += got

    def take(self, n):
        self.need(lambda data: n if len(data) >= n else None)
        got, self.input = self.input[:n], self.input[n:]
        return got

    def take_line(self):
        n = self.need(lambda data: data.index(b'\n') + 1 if b'\n' in data else None)
        return self.take(n)

    # -- commands --

    def run(self):
        try:
            if self.server.implicit_tls:
                self.start_tls()
            self.greet()
            self.flush()
            self.state = 'login'
            while self.state != 'over':
                self.one()
            self.flush()
            self.drop('close')
        except (Gone, ssl.SSLError, OSError):
            pass

    def one(self):
        if not self.input:
            self.waits += 1
            if self.lag:
                time.sleep(self.lag)
        raw = line = self.take_line()
        longest = len(line)
        while True:
            m = re.search(rb'\{(\d+)(\+?)\}\r?\n$', line)
            if not m:
                break
            if m.group(2) and 'LITERAL+' not in self.capabilities and (
                    'LITERAL-' not in self.capabilities or int(m.group(1)) > 4096):
                self.server.fault('a non-synchronising literal, but no LITERAL+: %r' % line)
                self.line('%s BAD no such literals here' % line.split()[0].decode())
                self.flush()
                return
            if not m.group(2):
                self.line('+ go on')
                self.flush()
            raw += self.take(int(m.group(1)))
            line = self.take_line()
            longest = max(longest, len(line))
            raw += line
        text = raw.rstrip(b'\r\n').decode('utf-8', 'surrogateescape')
        tag, _, rest = text.partition(' ')
        name, _, args = rest.partition(' ')
        name = name.upper()
        if name == 'UID':
            sub, _, args = args.partition(' ')
            name = 'UID_' + sub.upper()
        self.server.record(Command(self.number, time.monotonic(), tag, rest, longest))
        if self.hooked is None or not self.hooked(self, tag, name, args):
            method = getattr(self, 'cmd_' + name.replace('-', '_'), None)
            if method is None:
                self.server.fault('an unknown command: ' + text[:200])
                self.line(tag + ' BAD unknown command')
            else:
                method(tag, args)
        self.flush()

    def ok(self, tag, text='done'):
        self.line('%s OK %s' % (tag, text))

    def no(self, tag, text):
        self.line('%s NO %s' % (tag, text))
        return True

    def bye(self, text='going down', how='close'):
        self.line('* BYE ' + text)
        self.flush()
        self.drop(how)

    # -- any state --

    def greet(self):
        self.put(self.greeting % self.known() if '%s' in self.greeting else self.greeting)

    def known(self):
        if self.user is not None:
            return self.capabilities
        starttls = ' STARTTLS' if self.server.certificate and not self.tls else ''
        return '%s %s%s' % (self.capabilities, self.login, starttls)

    def cmd_CAPABILITY(self, tag, args):
        self.line('* CAPABILITY ' + self.known())
        self.ok(tag)

    def cmd_NOOP(self, tag, args):
        self.ok(tag)

    def cmd_ID(self, tag, args):
        self.line('* ID (%s %s)' % (self.string('name'), self.string('imapd.py')))
        self.ok(tag)

    def cmd_NAMESPACE(self, tag, args):
        self.line('* NAMESPACE ((%s %s)) NIL NIL' % (self.string(self.prefix), self.string(self.delimiter)))
        self.ok(tag)

    def cmd_ENABLE(self, tag, args):
        self.line('* ENABLED ' + args)
        self.ok(tag)

    def cmd_LOGOUT(self, tag, args):
        self.server.leave(self)
        self.line('* BYE see you')
        self.ok(tag)
        self.state = 'over'

    # -- login --

    def cmd_STARTTLS(self, tag, args):
        if self.server.certificate is None or self.tls:
            return self.line(tag + ' BAD no')
        self.ok(tag)
        self.flush()
        self.start_tls()
        self.input = b''

    def cmd_LOGIN(self, tag, args):
        words = tokens(args)
        if 'LOGINDISABLED' in self.login:
            self.server.fault('LOGIN in spite of LOGINDISABLED')
        self.enter(tag, *words[:2])

    def cmd_AUTHENTICATE(self, tag, args):
        words = args.split()
        if words[0].upper() != 'PLAIN':
            return self.no(tag, 'only PLAIN')
        if len(words) > 1:
            if 'SASL-IR' not in self.known():
                self.server.fault('an initial response, but no SASL-IR')
            code = words[1]
        else:
            self.line('+ ')
            self.flush()
            code = self.take_line().strip()
        self.enter(tag, *base64.b64decode(code).decode('utf-8', 'surrogateescape').split('\0')[1:])

    def enter(self, tag, user, password):
        if self.server.password != password or self.server.users is not None and user not in self.server.users:
            return self.no(tag, '[AUTHENTICATIONFAILED] no')
        self.user, self.state = user, 'in'
        self.server.enter(self)
        self.ok(tag, '[CAPABILITY %s] welcome' % self.capabilities)

    @property
    def boxes(self):
        return self.server.boxes if self.server.users is None else self.server.users[self.user]

    # -- mailboxes --

    def string(self, text, octets=None):
        """A string, quoted or as a literal."""
        if self.literals or re.search('[\r\n\\0]|[^\x01-\x7e]', text):
            data = text.encode('utf-8', 'surrogateescape')
            return '{%d}\r\n%s' % (len(data), text)
        return sample.quoted(text)

    def cmd_LIST(self, tag, args):
        m = re.match(r'"" "?\*"?( RETURN \((.*)\))?$', args)
        if not m:
            self.server.fault('LIST ' + args)
            return self.line(tag + ' BAD no')
        if m.group(1) and 'LIST-EXTENDED' not in self.capabilities and 'LIST-STATUS' not in self.capabilities:
            self.server.fault('LIST RETURN, but no LIST-EXTENDED')
            return self.line(tag + ' BAD no')
        items = re.search(r'STATUS \((.*?)\)', m.group(2) or '')
        for name, box in self.boxes.items():
            self.list_line(name, box)
            if items and not re.search(r'\\noselect|\\nonexistent', box.attributes, re.I):
                self.status_line(name, box, items.group(1))
        self.ok(tag)

    def list_line(self, name, box):
        delimiter = sample.quoted(box.delimiter) if box.delimiter else 'NIL'
        self.line('* LIST (%s) %s %s' % (box.attributes, delimiter, self.string(name)))

    def cmd_STATUS(self, tag, args):
        words = tokens(args)
        name = self.find(words[0])
        if name is None:
            return self.no(tag, '[NONEXISTENT] no such mailbox')
        self.status_line(name, self.boxes[name], ' '.join(words[1]))
        self.ok(tag)

    def status_line(self, name, box, items):
        have = self.status_values(name, box)
        self.line('* STATUS %s (%s)%s' % (self.string(name), ' '.join(
            '%s %s' % (i, have[i.upper()]) for i in items.split() if i.upper() in have),
            ' ' if self.status_space else ''))

    def status_values(self, name, box):
        with box.lock:
            have = {'MESSAGES': len(box.mails), 'UIDNEXT': box.uidnext, 'UIDVALIDITY': box.uidvalidity,
                    'RECENT': 0, 'UNSEEN': sum('\\Seen' not in m.flags for m in box.mails)}
            if 'CONDSTORE' in self.capabilities:
                have['HIGHESTMODSEQ'] = box.modseq
            if 'STATUS=SIZE' in self.capabilities:
                have['SIZE'] = sum(len(m.data) for m in box.mails)
            return have

    def find(self, name):
        if name.upper() == 'INBOX':
            name = next((n for n in self.boxes if n.upper() == 'INBOX'), name)
        return name if name in self.boxes else None

    def cmd_EXAMINE(self, tag, args):
        self.box = None
        name = self.find(tokens(args)[0])
        if name is None or '\\noselect' in self.boxes[name].attributes.lower():
            return self.no(tag, '[NONEXISTENT] no such mailbox')
        self.box, self.name = self.boxes[name], name
        self.examine_lines()
        self.ok(tag, '[READ-ONLY] done')

    def examine_lines(self):
        self.line('* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft)')
        self.line('* OK [PERMANENTFLAGS ()] none')
        self.line('* %d EXISTS' % len(self.box.mails))
        self.line('* 0 RECENT')
        self.line('* OK [UIDVALIDITY %d] valid' % self.box.uidvalidity)
        self.line('* OK [UIDNEXT %d] next' % self.box.uidnext)
        if 'CONDSTORE' in self.capabilities:
            self.line('* OK [HIGHESTMODSEQ %d] highest' % self.box.modseq)

    # -- mails --

    def cmd_UID_SEARCH(self, tag, args):
        m = re.match(r'(RETURN \(ALL\) )?(?:ALL|UID ([\d:*,]+)(?: LARGER (\d+) SMALLER (\d+))?)$', args)
        if not m:
            self.server.fault('UID SEARCH ' + args)
            return self.line(tag + ' BAD no')
        if m.group(1) and 'ESEARCH' not in self.capabilities:
            self.server.fault('RETURN, but no ESEARCH')
            return self.line(tag + ' BAD no')
        if self.box is None:   # sent along with an EXAMINE that was refused
            return self.line(tag + ' BAD no mailbox is open')
        with self.box.lock:
            uids = self.search_uids()
            if m.group(2):
                low, high = (int(x or 0) for x in m.groups()[2:])
                asked = {x.uid for _, x in self.box.inside(m.group(2)) if not high or low < len(x.data) < high}
                uids = [u for u in uids if u in asked]
        self.search_line(tag, uids, bool(m.group(1)))
        self.ok(tag)

    def search_uids(self):
        return [m.uid for m in self.box.mails]

    def search_line(self, tag, uids, extended):
        if extended:
            self.line('* ESEARCH (TAG "%s") UID%s' % (tag, ' ALL ' + ranges(uids) if uids else ''))
        else:
            self.line('* SEARCH' + ''.join(' %d' % u for u in uids))

    def cmd_UID_FETCH(self, tag, args):
        if self.box is None:
            return self.line(tag + ' BAD no mailbox is open')
        self.fetch(args)
        self.ok(tag)

    def fetch(self, args):
        words = tokens(args)
        items, since = words[1], None
        items = items if isinstance(items, list) else [items]
        if len(words) > 2:
            if words[2][0].upper() != 'CHANGEDSINCE' or 'CONDSTORE' not in self.capabilities:
                self.server.fault('UID FETCH ' + args)
            since = int(words[2][1])
        for number, m in self.box.inside(words[0]):
            if since is None or m.modseq > since:
                self.fetch_mail(number, m, items + (['MODSEQ'] if since is not None else []))

    def fetch_mail(self, number, m, items):
        """Answer for one mail; items as asked for."""
        parts = self.fetch_items(m, items)
        self.put(b'* %d FETCH (' % number + b' '.join(parts) + b')\r\n')

    def fetch_items(self, m, items):
        """What is asked for, UID in front, each as octets."""
        out = [b'UID %d' % m.uid]
        for item in items:
            upper = item.upper()
            if upper == 'FLAGS':
                out.append(b'FLAGS (%s)' % ' '.join(sorted(m.flags)).encode())
            elif upper == 'INTERNALDATE':
                out.append(b'INTERNALDATE ' + sample.internaldate(m.when).encode())
            elif upper == 'RFC822.SIZE':
                out.append(b'RFC822.SIZE %d' % len(m.data))
            elif upper == 'MODSEQ':
                out.append(b'MODSEQ (%d)' % m.modseq)
            elif upper.startswith('BODY.PEEK['):
                out.append(self.fetch_body(m, item if 'HEADER' in upper else upper))   # names as asked
            elif upper != 'UID':
                self.server.fault('UID FETCH of ' + item)
        return out

    def fetch_body(self, m, item):
        fields = re.match(r'BODY\.PEEK\[HEADER\.FIELDS \((.*)\)\]$', item)
        if item == 'BODY.PEEK[]':
            return self.body(b'BODY[]', m.data)
        if not fields:
            self.server.fault('UID FETCH of ' + item)
            return b'BODY[] NIL'
        names = ' '.join(self.string(f) for f in fields.group(1).split()) if self.literals else fields.group(1)
        return self.body(b'BODY[HEADER.FIELDS (%s)]' % names.encode(), header_fields(m.data, fields.group(1)))

    def body(self, name, data):
        return b'%s {%d}\r\n%s' % (name, len(data), data)


def header_fields(data, names):
    names = [n.strip('"').lower().encode() for n in names.split()]
    header = data if data.startswith((b'\r\n', b'\n')) else re.split(rb'\r?\n\r?\n', data, maxsplit=1)[0] + b'\r\n'
    out = b''
    for field in re.findall(rb'[^\r\n][^\n]*\n(?:[ \t][^\n]*\n)*', header):
        if field.split(b':')[0].strip().lower() in names:
            out += field
    return out + b'\r\n'


def ranges(uids):
    """[1, 2, 3, 7] -> '1:3,7'"""
    out, first, last = [], None, None
    for u in list(uids) + [None]:
        if first is not None and u == last + 1 if u is not None else False:
            last = u
            continue
        if first is not None:
            out.append('%d' % first if first == last else '%d:%d' % (first, last))
        first = last = u
    return ','.join(out)


def in_set(text, uid, highest):
    return any(low <= uid <= high for low, high in spans(text, highest))


def spans(text, highest):
    """'5:1,9:*' -> [(1, 5), (9, highest)]"""
    out = []
    for part in text.split(','):
        ends = [highest if x == '*' else int(x) for x in part.split(':')]
        out.append((min(ends), max(ends)))
    return out


def uids_of(text):
    """'1:3,7' -> [1, 2, 3, 7]"""
    out = []
    for part in text.split(','):
        ends = [int(x) for x in part.split(':')]
        out += range(ends[0], ends[-1] + 1)
    return out


def tokens(text):
    """Arguments: atoms and strings as str, parentheses as lists."""
    stack, at = [[]], 0
    while at < len(text):
        c = text[at]
        if c == ' ':
            at += 1
        elif c == '(':
            stack.append([])
            at += 1
        elif c == ')':
            done = stack.pop()
            stack[-1].append(done)
            at += 1
        elif c == '"':
            m = re.compile(r'"((?:\\.|[^"\\])*)"').match(text, at)
            stack[-1].append(re.sub(r'\\(.)', r'\1', m.group(1)))
            at = m.end()
        elif re.compile(r'\{\d+\+?\}\r\n').match(text, at):
            m = re.compile(r'\{(\d+)\+?\}\r\n').match(text, at)
            octets = text[m.end():].encode('utf-8', 'surrogateescape')[:int(m.group(1))]
            word = octets.decode('utf-8', 'surrogateescape')
            stack[-1].append(word)
            at = m.end() + len(word)
        else:
            m = re.compile(r'(?:[^ ()\[\]]|\[[^\]]*\])+').match(text, at)
            stack[-1].append(m.group())
            at = m.end()
    return stack[0]


class Server:
    """
    boxes         {name on the wire: Mailbox}, of every user; or, with users, None
    users         {user: boxes}
    certificate   (file, key): STARTTLS is offered, or with tls=True TLS from the first byte
    session       a subclass of Session, or a dict of attributes to change in it
    """

    def __init__(self, boxes=None, users=None, password='secret', certificate=None, tls=False,
                 session=Session, hook=None, address='127.0.0.1', port=0):
        if isinstance(session, dict):
            session = type('Changed', (Session,), session)
        self.boxes, self.users, self.password = boxes, users, password
        self.certificate, self.implicit_tls, self.session, self.hook = certificate, tls, session, hook
        self.commands, self.faults, self.sessions = [], [], []
        self.inside, self.peak, self.peaks = set(), 0, {}
        self.lock = threading.Lock()
        self.listener = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((address, port))
        self.listener.listen(50)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """Close everything at once."""
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        for s in list(self.sessions):
            try:
                s.raw.close()
                s.sock.close()
            except OSError:
                pass

    def _accept(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = self.session(self, sock, len(self.sessions) + 1)
            self.sessions.append(session)
            threading.Thread(target=self._serve, args=(session,), daemon=True).start()

    def _serve(self, session):
        with self.lock:
            self.inside.add(session)
            self.peak = max(self.peak, len(self.inside))
        try:
            session.run()
        finally:
            self.leave(session)
            for s in (session.sock, session.raw):
                try:
                    s.close()
                except OSError:
                    pass

    def enter(self, session):
        with self.lock:
            n = sum(1 for s in self.inside if s.user == session.user)
            self.peaks[session.user] = max(self.peaks.get(session.user, 0), n)

    def leave(self, session):
        with self.lock:
            self.inside.discard(session)

    def record(self, command):
        with self.lock:
            self.commands.append(command)
            if re.match(r'SELECT|STORE|UID STORE|EXPUNGE|UID EXPUNGE|CLOSE|COPY|APPEND|DELETE|RENAME|CREATE|'
                        r'SUBSCRIBE|FETCH|SEARCH', command.text, re.I) or 'BODY[' in command.text.upper():
                self.faults.append('a backup must not say: ' + command.text[:200])
            if command.longest > 1002 and not command.text.startswith('AUTHENTICATE'):   # a token may
                self.faults.append('a line of %d octets: %s' % (command.longest, command.text[:100]))

    def fault(self, text):
        """The client has broken the protocol."""
        self.faults.append(text)

    def lines(self, pattern=''):
        """Commands received, without tags, whose text matches."""
        return [c.text for c in self.commands if re.search(pattern, c.text)]

    def forget(self):
        self.commands, self.sessions, self.peak, self.peaks = [], [], 0, {}

    def waits(self):
        return sum(s.waits for s in self.sessions)


class Relay:
    """Stands between client and server; cut(k) says after how many octets to the client its k-th connection
    ends, -n: after n to the server; and how: 'rst', 'fin' (a TLS goodbye is not sent) or 'silence'. None: not at
    all. mangle(octets) returns what goes to the client instead. down, up: how many either got, of all connections."""

    def __init__(self, port, cut=lambda k: None, mangle=None):
        self.port_behind, self.cut, self.mangle = port, cut, mangle
        self.listener = socket.create_server(('127.0.0.1', 0), backlog=100)
        self.port, self.count, self.down, self.up = self.listener.getsockname()[1], 0, 0, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            self.count += 1
            threading.Thread(target=self._serve, args=(client, self.cut(self.count)), daemon=True).start()

    def _serve(self, client, cut):
        with client, socket.create_connection(('127.0.0.1', self.port_behind)) as server:
            at, how = cut or (1 << 60, None)
            left, counted = abs(at), client if at < 0 else server
            try:
                while left > 0:
                    for s in select.select([client, server], [], [])[0]:
                        data = s.recv(min(left, 1 << 16) if s is counted else 1 << 16)
                        if not data:
                            return
                        (client if s is server else server).sendall(
                            self.mangle(data) if self.mangle and s is server else data)
                        left -= len(data) if s is counted else 0
                        self.down += len(data) if s is server else 0
                        self.up += len(data) if s is client else 0
                if how == 'rst':
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                else:
                    if how == 'fin':
                        client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 16):
                        pass
            except OSError:
                pass
