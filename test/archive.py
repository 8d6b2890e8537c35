"""Reads an archive without any code of the program's, and says whether it is what the server holds.

What a stored mail looks like is stated here a second time, from the contract: a From line with the
INTERNALDATE in UTC, X-Mozilla-Status, a made Message-ID only where the mail has none, the mail with
LF line ends and mboxrd quoting, an empty line.
"""
import base64
import collections
import hashlib
import imaplib
import mailbox
import os
import re

import sample

STATES = {'\\seen': 0x0001, '\\answered': 0x0002, '\\flagged': 0x0004, '$forwarded': 0x1000}
GONE = 0x0008

Mail = collections.namedtuple('Mail', 'uid data state when fields')   # as a server holds it
Stored = collections.namedtuple('Stored', 'date state text')          # as an archive holds it


# ---- what the server holds ----

def state_of(flags):
    return sum(STATES.get(f.lower(), 0) for f in flags)


def epoch(text):
    """ 7-Feb-1994 21:52:25 -0800 -> seconds since 1970"""
    d, mon, y, h, m, s, sign, zh, zm = re.match(
        r' ?(\d+)-(\w+)-(\d+) (\d+):(\d+):(\d+) ([+-])(\d\d)(\d\d)', text).groups()
    days, year, month = 0, int(y), sample.MONTHS.index(mon) + 1
    year -= month <= 2   # days from the civil date, the inverse of sample.civil
    era, yoe = divmod(year, 400)
    days = era * 146097 + yoe * 365 + yoe // 4 - yoe // 100 + \
        (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + int(d) - 1 - 719468
    return days * 86400 + int(h) * 3600 + int(m) * 60 + int(s) - \
        int(sign + '1') * (int(zh) * 3600 + int(zm) * 60)


def fetch(imap, wire):
    """All mails of a mailbox, by imaplib."""
    if imap.select(sample.quoted(wire), readonly=True)[0] != 'OK':
        raise RuntimeError('cannot EXAMINE ' + wire)
    kind, parts = imap.uid('FETCH', '1:*', '(UID FLAGS INTERNALDATE BODY.PEEK[] '
                           'BODY.PEEK[HEADER.FIELDS (FROM TO CC DATE SUBJECT)])')
    if kind != 'OK':
        raise RuntimeError('FETCH: %r' % parts)
    mails, about, bodies = [], b'', {}
    for part in parts:
        if isinstance(part, tuple):
            about += part[0]
            bodies[b'HEADER.FIELDS' in part[0].upper()] = part[1]
        elif part is not None:
            about += part
            if len(bodies) == 2:
                mails.append(Mail(int(re.search(rb'UID (\d+)', about).group(1)), bodies[False],
                                  state_of(re.search(rb'FLAGS \((.*?)\)', about).group(1).decode().split()),
                                  epoch(re.search(rb'INTERNALDATE "(.*?)"', about).group(1).decode()),
                                  bodies[True]))
                about, bodies = b'', {}
    return mails


def fetch_all(imap):
    """{name on the wire: [Mail]} of all mailboxes that can be opened."""
    out = {}
    for line in filter(None, imap.list()[1]):   # b'' follows a literal
        if isinstance(line, tuple):
            line = re.sub(rb'\{\d+\}$', b'', line[0]) + b'"' + re.sub(rb'(["\\])', rb'\\\1', line[1]) + b'"'
        m = re.match(r'\((.*?)\) (?:"(?:\\.|[^"])*"|NIL) (.*)', line.decode())
        name = m.group(2)
        if name.startswith('"'):
            name = re.sub(r'\\(.)', r'\1', name[1:-1])
        if '\\noselect' not in m.group(1).lower():
            out[name] = fetch(imap, name)
    return out


# ---- what the contract makes of it ----

def lines_of(data):
    return data.replace(b'\r\n', b'\n')


def own_id(data):
    """The mail's Message-ID in its normal form, or b''."""
    header = re.split(rb'\n\n', lines_of(b'\n' + data), maxsplit=1)[0]
    field = re.search(rb'\nmessage-id[ \t]*:((?:[^\n]|\n[ \t])*)', header, re.I)
    text = re.sub(rb'[ \t\r\n\f\v]+', b' ', field.group(1)).strip() if field else b''
    return b'' if text == b'<>' else text


def made_id(fields, k=1):
    """The made one, from the server's answer to HEADER.FIELDS (FROM TO CC DATE SUBJECT)."""
    key = hashlib.sha1(fields.strip(b' \t\r\n\f\v')).hexdigest()
    return b'<%s%s@imap_backup.py.local>' % (key.encode(), b'.%d' % k if k > 1 else b'')


def quote(data):
    """As it is stored: LF line ends, a final one, mboxrd."""
    data = lines_of(data)
    if not data.endswith(b'\n'):
        data += b'\n'
    return re.sub(rb'(?m)^(>*From )', rb'>\1', data)


def from_date(when):
    day, date, month, year, h, m, s = sample.asctime_parts(when)
    return '%s %s %2d %02d:%02d:%02d %04d' % (day, month, date, h, m, s, year)


def file_name(wire, delimiter='/'):
    """The archive's file name for a mailbox's name on the wire (str; surrogateescape for raw octets)."""
    raw = wire.encode('utf-8', 'surrogateescape')
    out = []
    for octets in raw.split(delimiter.encode()) if delimiter else [raw]:
        decoded = decode_mutf7(octets)
        part = (octets if decoded is None else decoded).decode('utf-8', 'surrogateescape')
        if not out and part.upper() == 'INBOX':
            part = 'INBOX'
        name = ''
        for i, c in enumerate(part):
            edge = i in (0, len(part) - 1)
            bad = c in '/\\:*?"<>|%' or ord(c) < 32 or 127 <= ord(c) < 160 or 0xdc80 <= ord(c) <= 0xdcff \
                or c == '.' and (edge or delimiter) or c == ' ' and edge
            bad = bad or c == '&' and decoded is None
            name += ''.join('%%%02X' % o for o in c.encode('utf-8', 'surrogateescape')) if bad else c
        out.append(name)
    name = re.sub(r'^\.', '%2E', '.'.join(out)).encode()
    if len(name) > 140:
        tail = b'~' + hashlib.sha256(name).hexdigest()[:8].encode()
        cut = 131
        while cut and (name[cut] & 0xc0 == 0x80 or re.search(rb'%.?$', name[:cut])):
            cut -= 1
        name = name[:cut] + tail
    return name.decode() + '.mbox'


def decode_mutf7(part):
    """Modified UTF-7 to UTF-8; None if it is none."""
    def run(m):
        code = m.group(1)
        if code == b'':
            return b'&'
        octets = base64.b64decode(code.replace(b',', b'/') + b'=' * (-len(code) % 4), validate=True)
        text = octets.decode('utf-16-be')
        if re.search('[\x20-\x7e]', text) or base64.b64encode(octets).rstrip(b'=').replace(b'/', b',') != code:
            raise ValueError
        return text.encode()
    try:
        if re.search(rb'[^\x20-\x7e]|&[A-Za-z0-9+,]*([^A-Za-z0-9+,-]|$)|&[A-Za-z0-9+,]+-&(?!-)', part):
            raise ValueError
        return re.sub(rb'&([A-Za-z0-9+,]*)-', run, part)
    except ValueError:
        return None


# ---- what is on disk ----

def read(path):
    """[Stored]; text is what stands between the status line and the closing empty line."""
    with open(path, 'rb') as f:
        data = f.read()
    if data == b'':
        return []
    if not data.startswith(b'From ') or not data.endswith(b'\n\n'):
        raise AssertionError('%s: begins with %r, ends with %r' % (path, data[:20], data[-20:]))
    out = []
    for chunk in re.split(rb'(?m)^From ', data)[1:]:
        m = re.match(rb'MAILER-DAEMON (.{24})\nX-Mozilla-Status: ([0-9a-f]{4})\n', chunk)
        if not m or not chunk.endswith(b'\n\n'):
            raise AssertionError('%s: a message begins with %r and ends with %r' % (path, chunk[:80], chunk[-20:]))
        out.append(Stored(m.group(1).decode(), int(m.group(2), 16), chunk[m.end():-1]))
    return out


def compare(path, mails, duplicates=False, gone=()):
    """Is the archive what the server holds now (mails), and what it no longer holds (gone)? A list of
    complaints, empty if all is well."""
    complaints, wanted, made = [], collections.OrderedDict(), set()
    for m in sorted(mails, key=lambda m: m.uid) + [m._replace(state=GONE | m.state) for m in gone]:
        key, text = own_id(m.data), quote(m.data)
        if key == b'':
            key = made_id(m.fields)   # twins are numbered as they were stored
            made.add(key)
        wanted.setdefault(key, []).append((from_date(m.when), m.state, text, m.uid))
    found, numbers = collections.defaultdict(list), collections.defaultdict(list)
    stored = read(path)
    for s in stored:
        key, base = own_id(s.text), re.sub(rb'\.\d+@', b'@', own_id(s.text))
        if base in made and s.text.startswith(b'Message-ID: ' + key + b'\n'):
            numbers[base].append(key)
            key, s = base, s._replace(text=s.text.partition(b'\n')[2])
        found[key].append(s)
    for key, keys in numbers.items():
        if len(set(keys)) < len(keys):
            complaints.append('made IDs that are the same: %r' % keys)
    for key, copies in wanted.items():
        have = found.pop(key, [])
        every = duplicates or key in made
        wish = len(copies) if every else 1
        if len(have) != wish:
            complaints.append('%r stored %d times, not %d' % (key[:60], len(have), wish))
        for s in have:
            fits = [c for c in copies if c[:3] == s]
            if not fits:
                c = ([c for c in copies if c[2] == s.text] or copies)[0]
                complaints.append('%r (UID %d): %s' % (key[:60], c[3], ', '.join(
                    '%s %s instead of %s' % (what, brief(a, b), brief(b, a)) for what, a, b in
                    zip(('date', 'state', 'text'), s, c) if a != b)))
            elif every:
                copies.remove(fits[0])
    complaints += ['%r is stored but not on the server' % key[:60] for key in found]
    box = mailbox.mbox(path, create=False)
    n = len(box)
    if n != len(stored):
        complaints.append('mailbox.mbox finds %d mails, we find %d' % (n, len(stored)))
    for i, s in enumerate(stored[:n]):
        octets = box.get_bytes(i)
        if octets.split(b'\n', 1)[1] not in (s.text, s.text[:-1]):   # some versions drop a line end
            complaints.append('mailbox.mbox reads mail %d otherwise: %s' % (i, brief(octets, s.text)))
            break
    box.close()
    return complaints


def brief(a, b):
    """a, or where it differs from b if that is long."""
    if not isinstance(a, bytes) or len(a) < 60:
        return '%04x' % a if isinstance(a, int) else repr(a)
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return '%d octets, from %d %r' % (len(a), at, a[max(0, at - 20):at + 30])


def compare_account(folder, boxes, gone=None, delimiter='/', duplicates=False):
    """The same for all mailboxes {name on the wire: [Mail]} of an account."""
    complaints, gone = [], gone or {}
    for wire, mails in boxes.items():
        path = os.path.join(folder, file_name(wire, delimiter))
        if not os.path.exists(path):
            complaints.append('%s: no file %s' % (wire, path))
            continue
        complaints += ['%s: %s' % (wire, c) for c in compare(path, mails, duplicates, gone.get(wire, ()))]
        mode = os.stat(path).st_mode & 0o777
        if mode != 0o600:
            complaints.append('%s: mode %o' % (path, mode))
    names = {file_name(w, delimiter) for w in boxes}
    complaints += ['a file too many: ' + name for name in os.listdir(folder)
                   if name.endswith('.mbox') and name not in names]
    return complaints


def digests(folder):
    """{path: SHA-256} of the mbox files below a folder."""
    return {os.path.relpath(os.path.join(base, f), folder):
            hashlib.sha256(open(os.path.join(base, f), 'rb').read()).hexdigest()
            for base, _, files in os.walk(folder) for f in files if f.endswith('.mbox')}


def login(host, port, user, password, tls=None):
    imaplib._MAXLINE = 100_000_000
    imap = imaplib.IMAP4_SSL(host, port, ssl_context=tls) if tls else imaplib.IMAP4(host, port)
    imap.login(user, password)
    return imap
