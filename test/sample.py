"""Sample mails, the same for the same seed: varied ones, awkward ones, and very many.

A mail here is a Mail(data, flags, when): its octets as they are delivered, IMAP flags, and its
INTERNALDATE in seconds since 1970.
"""
import base64
import collections
import os
import random
import re
import time

Mail = collections.namedtuple('Mail', 'data flags when')

WORDS = ('lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut '
         'labore et dolore magna aliqua enim ad minim veniam quis nostrud exercitation').split()
PEOPLE = ('Ada Byron <ada@example.org>', '"Müller, Jörg" <jm@example.net>', 'bob@example.com',
          '=?utf-8?B?5bGx55Sw?= <yamada@example.jp>', 'Грета <greta@example.ru>')
FLAGS = ('', '\\Seen', '\\Seen \\Answered', '\\Flagged', '\\Seen $Forwarded', '\\Draft',
         '\\Seen \\Answered \\Flagged $Forwarded', '\\Deleted', 'NonJunk')
T0 = 1577880000   # 2020-01-01 12:00:00 UTC


def date(when):
    """For the Date: field (no locale)."""
    return '%s, %02d %s %04d %02d:%02d:%02d +0000' % asctime_parts(when)


def asctime_parts(when):
    days, second = divmod(when, 86400)
    year, month, day = civil(days)
    return ('Mon Tue Wed Thu Fri Sat Sun'.split()[(days + 3) % 7], day, MONTHS[month - 1], year,
            second // 3600, second // 60 % 60, second % 60)


MONTHS = 'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split()


def civil(days):
    """Days since 1970 as (year, month, day); for all years, unlike time.gmtime on some machines."""
    days += 719468
    era, doe = divmod(days, 146097)
    yoe = (doe - doe // 1460 + doe // 36524 - doe // 146096) // 365
    doy = doe - (365 * yoe + yoe // 4 - yoe // 100)
    m = (5 * doy + 2) // 153
    return yoe + era * 400 + (m >= 10), m + 3 if m < 10 else m - 9, doy - (153 * m + 2) // 5 + 1


def internaldate(when):
    """For APPEND and FETCH: "07-Feb-1994 21:52:25 +0000" with its quotes."""
    _, day, month, year, h, m, s = asctime_parts(when)
    return '"%2d-%s-%04d %02d:%02d:%02d +0000"' % (day, month, year, h, m, s)


def text(rng, octets):
    """Lines of words, CRLF, about so many octets."""
    lines, n = [], 0
    while n < octets:
        line = ' '.join(rng.choices(WORDS, k=rng.randint(3, 11)))
        lines.append(line)
        n += len(line) + 2
    return '\r\n'.join(lines) + '\r\n'


def mail(rng, label, body=None, flags=None, when=None, message_id=True):
    """An ordinary mail."""
    when = T0 + rng.randrange(100_000_000) if when is None else when
    head = ['From: ' + rng.choice(PEOPLE), 'To: ' + rng.choice(PEOPLE), 'Subject: ' + label,
            'Date: ' + date(when - rng.randrange(600))]
    if message_id:
        head.insert(rng.randrange(4), 'Message-ID: <%s.%08x@example.org>'
                    % (re.sub(r'[^a-z0-9]', '-', label), rng.getrandbits(32)))
    if rng.random() < .5:
        head.insert(0, 'Received: from a.example (a.example [192.0.2.%d])\r\n\tby b.example with ESMTPS;'
                    '\r\n\t%s' % (rng.randrange(256), date(when)))
    body = text(rng, rng.choice((50, 300, 2000))) if body is None else body
    data = '\r\n'.join(head).encode() + b'\r\n\r\n' + (body if isinstance(body, bytes) else body.encode())
    return Mail(data, rng.choice(FLAGS) if flags is None else flags, when)


def with_attachment(rng, label, octets):
    part = base64.encodebytes(rng.randbytes(octets)).replace(b'\n', b'\r\n').decode()
    return mail(rng, label, 'This is multipart.\r\n\r\n--=_b\r\nContent-Type: text/plain; charset=utf-8\r\n'
                'Content-Transfer-Encoding: 8bit\r\n\r\nSchöne Grüße\r\n\r\n--=_b\r\n'
                'Content-Type: application/octet-stream; name="a.bin"\r\n'
                'Content-Transfer-Encoding: base64\r\n\r\n' + part + '\r\n--=_b--\r\n')


def exact(rng, octets, flags=''):
    """A mail of exactly so many octets."""
    head = b'Message-ID: <size.%d.%d@x>\r\n\r\n' % (octets, rng.getrandbits(30))
    if octets <= len(head):
        return Mail(b'\r\n'[2 - octets:] if octets <= 2 else b'X: ' + b'y' * (octets - 7) + b'\r\n\r\n',
                    flags, T0 + octets)
    return Mail(head + (text(rng, octets).encode())[:octets - len(head)], flags, T0 + octets)


def awkward(seed=1):
    """[(what, Mail)]: everything that makes an mbox or a parser stumble, a real server permitting."""
    rng = random.Random(seed)
    same = b'From: a@x\r\nTo: b@x\r\nCc: c@x\r\nDate: Thu, 2 Jan 2020 00:00:00 +0000\r\nSubject: same\r\n'
    out = [(what, mail(rng, what, body)) for what, body in (
        ('from lines', 'From a friend\r\n>From b\r\n>>From c\r\n>>>From d\r\nFrom\r\nFromage\r\n From e\r\n'
                       '> From f\r\nx From g\r\nFrom \r\n>From \r\nfrom h\r\n\r\nFrom x Mon Jan  1 00:00:00 2020\r\n'
                       'X-Mozilla-Status: 0009\r\nMessage-ID: <forged@x>\r\n\r\nforged\r\n\r\nFrom last line'),
        ('empty body', ''), ('no final line end', 'one\r\ntwo'), ('only line ends', '\r\n\r\n\r\n'),
        ('ends in empty lines', 'x\r\n\r\n\r\n'), ('long line', 'x' * 100_000 + '\r\ny\r\n'),
        ('8 bit', bytes(range(128, 256)) + b'\r\n'), ('controls', bytes(c for c in range(1, 32) if c not in
                                                                       (10, 13)) + b'\x7f\r\n'),
        ('dots', '.\r\n..\r\n.x\r\n'), ('parentheses', ')\r\n(((\r\nA1 OK done\r\n* 1 FETCH (UID 1)\r\n{5}\r\n'),
        ('long from', '>' * 70_000 + 'From x\r\n' + '>' * 65_535 + 'From y\r\n'))]
    out += [(what, Mail(data, '\\Seen' if i % 3 == 0 else '', T0 + i)) for i, (what, data) in enumerate((
        ('header only', b'Subject: header only\r\nMessage-ID: <header.only@x>\r\n'),
        ('header without line end', b'Message-ID: <header.cut@x>\r\nSubject: header cut'),
        ('from in header', b'From nobody Mon Jan  1 00:00:00 2020\r\nMessage-ID: <from.header@x>\r\n>From: x\r\n'
                           b'Subject: s\r\n\r\nb\r\n'),
        ('no id', b'Subject: no id at all\r\nFrom: x@y\r\n\r\nbody\r\n'),
        ('empty id', b'Subject: empty id\r\nMessage-ID: <>\r\nFrom: x@y\r\n\r\nbody\r\n'),
        ('blank id', b'Subject: blank id\r\nMessage-ID:\r\nFrom: x@y\r\n\r\nbody\r\n'),
        ('spaces for id', b'Subject: spaces for id\r\nMessage-ID:   \t \r\n\t \r\nFrom: x@y\r\n\r\nbody\r\n'),
        ('folded id', b'Message-ID:\r\n  <folded.id@x>\r\nSubject: folded\r\n\r\nbody\r\n'),
        ('id folded inside', b'Message-ID: <folded\r\n\tinside  twice@x>\r\nSubject: folded\r\n\r\nbody\r\n'),
        ('two ids', b'Message-ID: <first.of.two@x>\r\nMessage-ID: <second.of.two@x>\r\n\r\nbody\r\n'),
        ('id in capitals', b'MESSAGE-ID: <capitals@x>\r\n\r\nbody\r\n'),
        ('id without blank', b'Message-Id:<without.blank@x>\r\nSubject: s\r\n\r\nbody\r\n'),
        ('id without brackets', b'Message-ID: no brackets here\r\n\r\nbody\r\n'),
        ('id in body only', b'Subject: id in body\r\nFrom: z@y\r\n\r\nMessage-ID: <body@x>\r\n'),
        ('8 bit id', b'Message-ID: <\xc3\xa9t\xe9@x>\r\n\r\nbody\r\n'),
        ('near id', b'Message-IDs: <near@x>\r\nX-Message-ID: <near@x>\r\nSubject: near\r\n\r\nbody\r\n'),
        ('long id', b'Message-ID: <' + b'long.' * 20_000 + b'@x>\r\nSubject: long id\r\n\r\nbody\r\n'),
        ('huge header', b'Message-ID: <huge.header@x>\r\n' + b''.join(
            b'X-%d: %s\r\n' % (k, b'v' * 1990) for k in range(100)) + b'\r\nbody\r\n'),
        ('huge recipients', b'Subject: huge recipients\r\nTo: ' + b',\r\n '.join(
            b'Person %d <p%d@example.org>' % (k, k) for k in range(4000)) + b'\r\n\r\nbody\r\n'),
        ('bare LF', b'Message-ID: <bare.lf@x>\nSubject: lf\n\none\nFrom x\ntwo\n'),
        ('bare CR', b'Message-ID: <bare.cr@x>\r\nSubject: cr\r\n\r\none\rtwo\r\r\nthree\r'),
        ('status inside', b'X-Mozilla-Status: 0013\r\nMessage-ID: <status.inside@x>\r\n\r\nb\r\n'),
        ('original made', b'Message-ID: <0123456789012345678901234567890123456789@imap_backup.py.local>\r\n\r\nb\r\n'),
        ('same 1', same + b'\r\nfirst\r\n'), ('same 2', same + b'\r\nsecond\r\n'), ('same 3', same + b'\r\n3rd\r\n'),
        ('no header', b'\r\nno header at all\r\n'),
        ('copy 1', b'Message-ID: <copied@x>\r\nSubject: copy\r\n\r\none\r\n'),
        ('copy 2', b'Message-ID: <copied@x>\r\nSubject: copy\r\nX: y\r\n\r\ntwo\r\n')))]
    for n in (1, 2, 65535, 65536, 65537, 131072):
        out.append(('%d octets' % n, exact(rng, n)))
    for when in (0, 1, 951782400, 2**31 - 1, 2**31, 4102444800):
        out.append(('date %d' % when, mail(rng, 'date %d' % when, when=when)))
    return out


def forged(rng):
    """Octets of mails that are to break an archive: bodies that look like one, and every octet that ends a
    line or a string."""
    pretend = (b'From MAILER-DAEMON Thu Jan  1 00:00:00 1970\r\nX-Mozilla-Status: 0008\r\n'
               b'Message-ID: <victim@x>\r\nSubject: forged\r\n\r\nbody\r\n\r\n')
    odd = [b'\r', b'\n', b'\0', b'\r\n', b'From ', b'>', b'x', b'\r\r\n', b'\n\r', b'\0\r\n', b'X-Mozilla-Status: 0008\r\n']
    bodies = [pretend * 5, b'\r\n' + pretend, pretend.replace(b'\r\n', b'\n') * 3, pretend.replace(b'\r\n', b'\r') * 3,
              b'From ', b'From', b'>From ', b'\r\nFrom ', b'\r', b'\r\n\r', b'\n\nFrom x\n', b'\0', b'\0' * 5000]
    bodies += [b''.join(rng.choices(odd, k=rng.randrange(200))) for _ in range(60)]
    heads = [b'Message-ID: <forged.%d@x>\r\n' % n for n in range(len(bodies))]
    out = [head + b'\r\n' + body for head, body in zip(heads, bodies)]
    out += [b'Message-ID: <victim@x>\r\nSubject: the victim\r\n\r\nbody\r\n',
            b'X-Mozilla-Status: 0008\r\nFrom nobody\r\nMessage-ID: <status.first@x>\r\n\r\n',
            b'Message-ID: <' + b'long' * 25_000 + b'@x>\r\n\r\nlong\r\n',
            b'Message-ID: <' + b'long' * 25_000 + b'!@x>\r\n\r\nnearly the same\r\n',
            b'X: ' + b'y' * 1_000_000 + b'\r\nMessage-ID: <after.a.megabyte@x>\r\n\r\nbody\r\n',
            b'y' * 1_000_000 + b':\r\n ' + b'>' * 70_000 + b'From \r\nMessage-ID: <name.of.a.megabyte@x>\r\n\r\n',
            b'Subject: ' + b'z\r\n\t' * 100_000 + b'\r\nFrom: folded@x\r\n\r\nno ID, and a megabyte of folds\r\n',
            b'Message-ID: <nul\0inside@x>\r\n\r\n', b'Message-ID: <nul\0other@x>\r\n\r\n',
            b'Message-ID: <cr\rinside@x>\r\n\r\n', b'Message-ID\0: <no@x>\r\nSubject: NUL in a name\r\n\r\n']
    return out


MAILBOXES = ('INBOX', 'Sent', 'Drafts', 'Work', 'Work/Projects', 'Work/Projects/2024', 'Entwürfe',
             'Reise/Größe & Maß', '日本語/受信', 'Lists/linux.kernel', 'a "quoted" \\ name')


def boxes(seed=1, mails=300):
    """{mailbox name in UTF-8: [Mail]}: a person's account; the INBOX holds the awkward mails too."""
    rng = random.Random(seed)
    out = {name: [] for name in MAILBOXES}
    for i in range(mails):
        name = rng.choice(MAILBOXES[:-1])
        out[name].append(with_attachment(rng, 'mail %d' % i, rng.choice((500, 9000, 60_000)))
                         if i % 7 == 0 else mail(rng, 'mail %d' % i))
    out['INBOX'] += [m for _, m in awkward(seed)]
    return out


def mutf7(name):
    """A mailbox name as it is on the wire (RFC 3501 5.1.3)."""
    def code(m):
        return '&-' if m.group() == '&' else '&' + base64.b64encode(
            m.group().encode('utf-16-be')).decode().rstrip('=').replace('/', ',') + '-'
    return re.sub(r'&|[^\x20-\x7e]+', code, name)


def quoted(name):
    return '"%s"' % name.replace('\\', '\\\\').replace('"', '\\"')


def deliver(imap, mailbox, mails):
    """APPEND (imaplib, logged in) to a mailbox, named in UTF-8, that is made if need be. What a server
    refuses is skipped; returns those it took."""
    took, name = [], quoted(mutf7(mailbox))
    if mailbox.upper() != 'INBOX':
        imap.create(name)
    for m in mails:
        imap.literal = m.data   # imap.append() would change line ends
        try:
            answer = imap._simple_command('APPEND', name, '(%s)' % m.flags, internaldate(m.when))[0]
        except imap.error:
            answer = 'BAD'
        if answer == 'OK':
            took.append(m)
    return took


LETTERS = {'\\Seen': 'S', '\\Answered': 'R', '\\Flagged': 'F', '\\Draft': 'D', '\\Deleted': 'T'}


def fill_maildir(path, mails):
    """Write mails into a maildir, past any server; INTERNALDATE is the file's time."""
    for name in ('cur', 'new', 'tmp'):
        os.makedirs(os.path.join(path, name), exist_ok=True)
    base, pid = int(time.time()), os.getpid()
    for i, m in enumerate(mails):
        letters = ''.join(sorted(LETTERS.get(f, '') for f in m.flags.split()))
        file = os.path.join(path, 'cur', '%d.M%07dP%d.test:2,%s' % (base, i, pid, letters))
        with open(file, 'wb') as f:
            f.write(m.data)
        os.utime(file, (m.when, m.when))


def many(n, seed=1, octets=200):
    """n small mails, as fast as can be."""
    body = text(random.Random(seed), octets)[:octets].encode() + b'\r\n'
    for i in range(n):
        yield Mail(b'From: a@x\r\nTo: b@x\r\nSubject: number %d\r\nMessage-ID: <many.%d.%d@example.org>\r\n'
                   b'Date: %s\r\n\r\n' % (i, seed, i, date(T0 + i).encode()) + body,
                   '\\Seen' if i % 2 else '', T0 + i)
