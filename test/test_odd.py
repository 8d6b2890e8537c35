"""What people met at their servers and reported, each kind with some brothers; tables as in test_wire.py."""
import base64
import os
import random
import re
import select
import time

import archive
import imapd
import sample
import servers
from imapd import BARE, FULL, Mailbox, Server, Session
from test_wire import Case, always, answers, drop, few, letters, play
from torture import held

PLAIN = FULL.replace(' CONDSTORE', '')


class Counting(Session):
    """Keeps the mails that were fetched whole, in the server's `bodies`."""

    def fetch_body(self, m, item):
        if item == 'BODY.PEEK[]':
            self.server.bodies.append(m.data)
        return Session.fetch_body(self, m, item)


def serve(t, boxes, **odd):
    server = Server(boxes, session=type('Odd', (Counting,), odd))
    server.bodies = []
    t.cleanups.append(server.stop)
    return server


def clear(t, server, **more):
    """Its account, without TLS."""
    return t.account(server, mode='plain', ssl=False, **more)


def fetched(t, server, *args, **more):
    """Run a backup; what it said, and the mails that it fetched whole."""
    del server.bodies[:]
    got = t.backup(*args, **more)
    assert not server.faults, server.faults
    return got.err, list(server.bodies)


def with_id(name, body, *more):
    return b'\r\n'.join((b'From: a@x', b'Message-ID: <%s@x>' % name, *more, b'', body, b''))


# ---- octets between the words ----

def keyword(word, where='flags permanent fetch'):
    """Mails bear this keyword, and the server tells it there."""
    box = Mailbox(letters())
    for m in box.mails[::2]:
        m.flags.add(word)

    def line(self, text):
        for what, begin, end in (('flags', '* FLAGS (', ')'), ('permanent', '* OK [PERMANENTFLAGS (', ')]')):
            if what in where and text.startswith(begin):
                text = '%s\\Seen %s%s%s' % (begin, word, ' \\*' * (what == 'permanent'), end)
        Session.line(self, text)

    def fetch_items(self, m, items):
        return [re.sub(rb' ?%s' % re.escape(word.encode()), b'', i) if i.startswith(b'FLAGS') and 'fetch' not in where
                else i for i in Session.fetch_items(self, m, items)]
    return Case(boxes={'INBOX': box, 'Behind': few(3)}, tries=1, line=line, fetch_items=fetch_items)


def test_keywords_with_brackets(t):
    """RFC 3501 has "[" in an atom, and servers take more than that from their users."""
    play(t, {
        'open': keyword('[work'), 'close': keyword('work]'), 'only': keyword('['), 'pair': keyword('[work]'),
        'inside': keyword('a[b'), 'many': keyword('][]]['), 'open-bare': keyword('[work', 'flags'),
        'open-fetch': keyword('[work', 'fetch'), 'close-fetch': keyword(']work', 'fetch'),
        'close-code': keyword('wo]rk', 'permanent'), 'body': keyword('BODY[', 'fetch'),
        'stray': keyword('wo(rk'), 'stray-first': keyword('(work'), 'stray-flags': keyword('wo(rk', 'flags'),
        'stray-code': keyword('wo(rk', 'permanent'), 'stray-fetch': keyword('wo(rk', 'fetch'),
    })


def empty_line(before, what='\r\n'):
    """An empty line in front of each line of the server's that matches."""
    def line(self, text):
        if re.match(before, text):
            self.put(what)
        Session.line(self, text)

    def fetch_mail(self, number, m, items):
        if re.match(before, '* FETCH'):
            self.put(what)
        Session.fetch_mail(self, number, m, items)
    return dict(line=line, fetch_mail=fetch_mail)


def behind_literal(what, only=''):
    def body(self, name, data):
        return Session.body(self, name, data) + (what if only in name.decode() else b'')
    return dict(body=body)


def test_empty_lines(t):
    play(t, {
        'mail': Case(tries=1, **behind_literal(b'\r\n')), 'mail-lf': Case(tries=1, **behind_literal(b'\n')),
        'mail-two': Case(tries=1, **behind_literal(b'\r\n\r\n')), 'mail-blank': Case(tries=1, **behind_literal(b' \r\n ')),
        'mail-blanks': Case(tries=1, **behind_literal(b'  ')), 'header': Case(tries=1, **behind_literal(b'\r\n', 'HEADER')),
        'untagged': Case(tries=1, **empty_line(r'\* (?!OK \[CAP)')), 'tagged': Case(tries=1, **empty_line('A')),
        'everywhere': Case(tries=1, **empty_line('')), 'bare-lf': Case(tries=1, **empty_line(r'\* ', '\n')),
        'fetch': Case(tries=1, **empty_line(r'\* FETCH')), 'bare': Case(tries=1, capabilities=BARE, **empty_line('')),
    })


def wide(text):
    """Each blank outside of quotes twice."""
    return re.sub(r'"(?:\\.|[^"\\])*"| ', lambda m: '  ' if m.group() == ' ' else m.group(), text)


def widens(pattern, **more):
    def line(self, text):
        Session.line(self, wide(text) if re.match(pattern, text) else text)
    return Case(tries=1, **dict(dict(line=line), **more))


def wide_fetch(self, number, m, items):
    def widen(item):
        head, end, data = item.partition(b'\r\n')
        name, bracket, rest = head.rpartition(b']')
        return name + bracket + wide(rest.decode()).encode() + end + data
    self.put(b'*  %d  FETCH  (' % number + b'  '.join(widen(i) for i in self.fetch_items(m, items)) + b')\r\n')


def test_two_blanks(t):
    play(t, {
        'exists': widens(r'\* \d+ '), 'before': Case(tries=1, line=lambda self, text: Session.line(self, re.sub(
            r'^\* (\d+ EXISTS)', r'*  \1', text))),
        'behind': Case(tries=1, line=lambda self, text: Session.line(self, text + ' ' * text.endswith('EXISTS'))),
        'codes': widens(r'\* OK \[(?!CAP)'), 'capability': widens(r'.*CAPABILITY'), 'list': widens(r'\* LIST'),
        'status': widens(r'\* STATUS'), 'status-bare': widens(r'\* STATUS', capabilities=BARE),
        'search': widens(r'\* SEARCH', capabilities=BARE), 'esearch': widens(r'\* ESEARCH'), 'tagged': widens('A'),
        'fetch': Case(tries=1, fetch_mail=wide_fetch),
    })


def rewrites(pattern, to, **more):
    """What of the server's lines matches is written otherwise."""
    def line(self, text):
        Session.line(self, re.sub(pattern, to, text))
    return Case(tries=1, **dict(dict(line=line), **more))


def fetches(change, **more):
    def fetch_mail(self, number, m, items):
        self.put(change(number, self.fetch_items(m, items)))
    return Case(tries=1, **dict(dict(fetch_mail=fetch_mail), **more))


def test_words_in_odd_places(t):
    """Line ends within lists, blanks, brackets, items in another order; one connection all the same."""
    def attributes(text):
        return Case(boxes={'INBOX': Mailbox(letters(), attributes=text), 'Behind': few(2)}, tries=1)
    play(t, {
        'fetch': fetches(lambda n, i: b'* %d FETCH\r\n (' % n + b' '.join(i) + b')\r\n'),
        'items': fetches(lambda n, i: b'* %d FETCH (\r\n' % n + b'\r\n'.join(i) + b'\r\n)\r\n'),
        'items-lf': fetches(lambda n, i: b'* %d FETCH (' % n + b'\n '.join(i) + b'\n)\n'),
        'behind-body': fetches(lambda n, i: b'* %d FETCH (' % n + b' '.join(i).replace(b'BODY[] {', b'BODY[]\r\n {') + b')\r\n'),
        'lower': fetches(lambda n, i: b'* %d fetch (' % n + b' '.join(x.split(b' ')[0].lower() + x[len(x.split(b' ')[0]):] for x in i) + b')\r\n'),
        'two-close': fetches(lambda n, i: b'* %d FETCH (' % n + b' '.join(i) + b'))\r\n'),
        'no-open': fetches(lambda n, i: b'* %d FETCH ' % n + b' '.join(i) + b'\r\n'),
        'tabs': fetches(lambda n, i: b'*\t%d\tFETCH\t(' % n + b'\t'.join(i) + b'\t)\t\r\n'),
        'crcrlf': fetches(lambda n, i: b'* %d FETCH (' % n + b' '.join(i) + b')\r\r\n'),
        'reversed': fetches(lambda n, i: b'* %d FETCH (' % n + b' '.join(i[::-1]) + b')\r\n'),
        'unknown': fetches(lambda n, i: b'* %d FETCH (X-GM-LABELS ("\\\\Inbox" [x] "a)b") EMAILID (x[) THREADID NIL ' % n + b' '.join(i) + b')\r\n'),
        'leading': rewrites(r'^\*', ' *'), 'status-break': rewrites(r'^(\* STATUS \S+) \(', '\\1\r\n ('),
        'status-break-within': rewrites(r'^(\* STATUS .*) (UIDNEXT|UIDVALIDITY)', '\\1\r\n \\2'),
        'list-break': rewrites(r'^(\* LIST \(\S*\)) ', '\\1\r\n '), 'list-break-within': rewrites(r'^(\* LIST \(\S*\) \S+) ', '\\1\r\n '),
        'search-break': rewrites(r'^(\* SEARCH 1) ', '\\1\r\n ', capabilities=BARE),
        'esearch-space': rewrites(r',', ', '), 'code-space': rewrites(r'\[(UID\w+) (\d+)\]', r'[ \1  \2 ]'),
        'code-open': rewrites(r'\[(UID\w+) (\d+)\]', r'[\1 \2'), 'code-text': rewrites(r'\[(UID\w+) (\d+)\].*', r'[\1 \2]'),
        'code-glued': rewrites(r'OK \[(UID\w+) (\d+)\].*', r'OK[\1 \2]x'),
        'flags': rewrites(r'^\* FLAGS .*', r'* FLAGS (\\Seen [ ] { "x ( )) y'),
        'flags-none': rewrites(r'^\* FLAGS .*', r'* FLAGS'), 'permanent': rewrites(r'\[PERMANENTFLAGS.*', r'[PERMANENTFLAGS (\\* ] x'),
        'exists': rewrites(r'^\* (\d+) EXISTS', r'* \1 EXISTS (x) [y'),
        'greet-blank': Case(tries=1, greeting='\r\n * OK ready\r\n'), 'greet-lower': Case(tries=1, greeting='* ok ready\r\n'),
        'greet-code': Case(tries=1, greeting='* OK [CAPABILITY IMAP4rev1 [x] AUTH=PLAIN ready\r\n'),
        'greet-two': Case(tries=1, greeting='* OK one\r\n* OK [ALERT] two\r\n'),
        'esearch-count': rewrites(r'^(\* ESEARCH .*UID) ', r'\1 COUNT 12 MIN 1 '), 'esearch-notag': rewrites(r'^\* ESEARCH \(TAG "\w+"\)', '* ESEARCH'),
        'esearch-trail': rewrites(r'^(\* ESEARCH .*)', r'\1 MODSEQ 99 '), 'esearch-nouid': rewrites(r'^(\* ESEARCH .*) UID', r'\1'),
        'esearch-tagodd': rewrites(r'TAG "\w+"', 'TAG "x(]" [y'),
        'search-trail': rewrites(r'^(\* SEARCH.*)', r'\1 (MODSEQ 917)  ', capabilities=BARE),
        'attributes': attributes('\\HasNoChildren [x] \\a(b'), 'attributes-odd': attributes('\\HasNoChildren {x "y'), 'attributes-none': attributes(''),
        'status-extra': rewrites(r'^(\* STATUS .*)\)$', r'\1 X-ODD (1 [2) X "a)" RECENT 0)'),
        'status-odd': rewrites(r'^(\* STATUS \S+ )\(', r'\1(X-NOVALUE '), 'status-close': rewrites(r'^(\* STATUS .*)\)$', r'\1'),
        'status-twice': rewrites(r'^(\* STATUS .*)\)$', r'\1) (x)'),
        'flags-nil': fetches(lambda n, i: b'* %d FETCH (' % n + b' '.join(i).replace(b'FLAGS ()', b'FLAGS NIL') + b')\r\n'),
        'uid-first-sep': fetches(lambda n, i: b'* %d FETCH (' % n + i[0] + b')\r\n* %d FETCH (' % n + b' '.join(i) + b')\r\n'),
        'quoted-kw': keyword('"x"', 'fetch flags'), 'brace-kw': keyword('{3}', 'fetch'), 'comma-kw': keyword('a,b', 'fetch flags permanent'),
        'literal-plus': Case(tries=1, body=lambda self, name, data: b'%s {%d+}\r\n%s' % (name, len(data), data)),
        'tilde': Case(tries=1, body=lambda self, name, data: b'%s ~{%d}\r\n%s' % (name, len(data), data)),
        'body-space': Case(tries=1, body=lambda self, name, data: name.replace(b'[', b' [ ').replace(b']', b' ]') + b' { %d }\r\n%s' % (len(data), data)),
        'ok-behind': rewrites(r'^(A\d+ OK).*', r'\1', capabilities=FULL), 'ok-bracket': rewrites(r'^(A\d+ OK) (?!\[)', r'\1 [X [y] (z] '),
        'ok-tag-lower': rewrites(r'^A(\d+)', r'a\1'), 'ok-tab': rewrites(r'^(A\d+) ', '\\1\t '),
        'modseq-list': rewrites(r'HIGHESTMODSEQ (\d+)\]', r'HIGHESTMODSEQ (\1)]'),
        'uidnext-big': rewrites(r'UIDNEXT (\d+)\]', r'UIDNEXT 99999999999]'),
        'list-nodelim': rewrites(r'^(\* LIST \(.*?\)) "/"', r'\1 ""'), 'list-baredelim': rewrites(r'^(\* LIST \(.*?\)) "/"', r'\1 /'),
        'list-oldname': rewrites(r'^(\* LIST .*)', r'\1 ("OLDNAME" ("x y"))'),
        'extra-untagged': rewrites(r'^(\* \d+ EXISTS)', '* X [y (z {q "\r\n* VANISHED 5\r\n\\1'),
    })


def test_names_of_odd_octets(t):
    def bare(self, text, octets=None):
        return text

    def case(*names, **more):
        return Case(boxes={n: few(2 + i) for i, n in enumerate(('INBOX', *names))}, string=more.pop('string', bare), tries=1, **more)
    play(t, {
        'brackets': case('[Gmail]/All Mail', 'a]b', 'x[', delimiter='/'), 'brackets-bare': case('[Gmail]/All', 'a]b', 'x[', capabilities=BARE),
        'parens': case('a (b)', '(c)', 'd(', 'e)', capabilities=FULL), 'parens-bare': case('a (b)', '(c)', 'd(', 'e)', capabilities=BARE),
        'quote': case('a"b', "it's", capabilities=FULL), 'star': case('a*b', 'a%b', 'ü', capabilities=FULL),
        'literals': Case(boxes={n: few(2) for n in ('INBOX', 'a (b)', '{x}', 'A B')}, literals=True, tries=1),
        'braces': case('x{3}', 'y{'), 'nil': case('NIL', 'nil'), 'plus': case('+', '*', 'A1 OK', capabilities=FULL, string=Session.string),
    })


def bad(*names):
    def hook(session, tag, name, args):
        if name in names:
            session.line(tag + ' BAD no such thing')
            return True
    return hook


def test_answered_bad(t):
    """What a server offers and does not have is asked for otherwise."""
    def condstore(session, tag, name, args):
        if name == 'EXAMINE' and 'CONDSTORE' in args:
            session.line(tag + ' BAD no such parameter')
            return True

    def headers(session, tag, name, args):
        if name == 'UID_FETCH' and 'HEADER' in args:
            session.line(tag + ' BAD no headers')
            return True

    def returns(session, tag, name, args):
        if 'RETURN' in args:
            session.line(tag + ' BAD no RETURN')
            return True

    def changed(session, tag, name, args):
        if 'CHANGEDSINCE' in args:
            session.line(tag + ' BAD no CHANGEDSINCE')
            return True
    play(t, {
        'id': Case(hook=bad('ID'), tries=1), 'status': Case(hook=bad('STATUS'), capabilities=BARE, tries=1),
        'search': Case(hook=bad('UID_SEARCH'), tries=1), 'search-bare': Case(hook=bad('UID_SEARCH'), capabilities=BARE, tries=1),
        'condstore': Case(hook=condstore), 'headers': Case(hook=headers), 'returns': Case(hook=returns, tries=1),
        'changed': Case(hook=changed, tries=1),
    })


def test_untagged_data_behind_the_answer(t):
    def late(words):
        def examine(self, tag, args):
            self.late = []
            self.line = lambda text: self.late.append(text) if any(w in text for w in words) else Session.line(self, text)
            Session.cmd_EXAMINE(self, tag, args)
            del self.line
            for text in self.late:
                Session.line(self, text)
        return examine
    play(t, {
        'exists': Case(cmd_EXAMINE=late(['EXISTS'])), 'exists-bare': Case(cmd_EXAMINE=late(['EXISTS']), capabilities=BARE),
        'uidnext': Case(cmd_EXAMINE=late(['UIDNEXT'])), 'modseq': Case(cmd_EXAMINE=late(['MODSEQ'])),
        'uidvalidity': Case(cmd_EXAMINE=late(['UIDVALIDITY'])),
        'uidvalidity-bare': Case(cmd_EXAMINE=late(['UIDVALIDITY']), capabilities=BARE),
        'all': Case(cmd_EXAMINE=late(['EXISTS', 'UIDNEXT', 'UIDVALIDITY', 'MODSEQ', 'FLAGS'])),
        'all-bare': Case(cmd_EXAMINE=late(['EXISTS', 'UIDNEXT', 'UIDVALIDITY', 'MODSEQ', 'FLAGS']), capabilities=BARE),
    })


def test_dates_in_odd_forms(t):
    def says(date):
        def fetch_items(self, m, items):
            return [b'INTERNALDATE ' + date(m) if i.startswith(b'INTERNALDATE') else i for i in Session.fetch_items(self, m, items)]
        return Case(tries=1, fetch_items=fetch_items)
    play(t, {
        'blanks': says(lambda m: sample.internaldate(m.when).replace(' ', '  ').encode()),
        'literal': says(lambda m: b'{%d}\r\n' % (len(sample.internaldate(m.when)) - 2) + sample.internaldate(m.when).strip('"').encode()),
        'lower': says(lambda m: sample.internaldate(m.when).lower().encode()),
    })


# ---- names ----

def bare_names(self, text, octets=None):
    """A name without quotes, whatever is in it."""
    return text


def literal_wanted(*commands):
    """These answer BAD where a quoted string has an escape in it; the server itself writes literals."""
    def hook(session, tag, name, args):
        if name in commands and re.match(r'"[^"]*\\', args):
            session.line(tag + ' BAD Command Argument Error. 12')
            return True

    def string(self, text, octets=None):
        return '{%d}\r\n%s' % (len(text), text) if re.search(r'["\\]', text) else Session.string(self, text)
    return dict(hook=hook, string=string)


def backslashes(*names):
    return {name: Mailbox(letters(2 + i, name), delimiter='\\') for i, name in enumerate(names)}


def test_names_with_blanks(t):
    """Without quotes; what follows is the rest of the name."""
    def case(*names, delimiter='\\', **more):
        boxes = backslashes('INBOX', *names)
        for box in boxes.values():
            box.delimiter = delimiter
        return Case(boxes=boxes, delimiter=delimiter, string=bare_names, tries=1, **more)

    def childinfo(self, name, box):
        self.line('* LIST (%s) "/" %s ("CHILDINFO" ("SUBSCRIBED"))' % (box.attributes, name))
    years = 'Projects\\Year 1', 'Projects\\Year 2'
    play(t, {
        'status': case(*years, capabilities=PLAIN), 'condstore': case(*years), 'bare': case(*years, capabilities=BARE),
        'two': case('a  b', 'a b', 'a'), 'slash': case('Sent Items', 'x/y z', delimiter='/'),
        'extended': Case(boxes={'INBOX': few(2), 'A': few(3)}, list_line=childinfo, tries=1),
    })


def test_names_that_need_a_literal(t):
    names = 'Clients/The "Blue" House', 'back\\slash'
    boxes = [{name: few(2 + i) for i, name in enumerate(('INBOX', *names, 'Behind'))} for _ in range(5)]
    play(t, {
        'both': Case(boxes=boxes[0], **literal_wanted('EXAMINE', 'STATUS')),
        'status': Case(boxes=boxes[1], capabilities='IMAP4rev1 LITERAL+', **literal_wanted('EXAMINE', 'STATUS')),
        'bare': Case(boxes=boxes[2], capabilities=BARE, **literal_wanted('EXAMINE', 'STATUS')),
        'examine': Case(boxes=boxes[3], capabilities=BARE, **literal_wanted('EXAMINE')),
        'minus': Case(boxes=boxes[4], capabilities='IMAP4rev1 LITERAL-', **literal_wanted('EXAMINE', 'STATUS')),
    })


def test_names_that_decode_alike(t):
    """A file each, whatever it is called, and the same one in the next run."""
    boxes = {name: few(2 + i) for i, name in enumerate(
        ('INBOX', '&', '&-', 'a&b', 'a&-b', 'x/&', 'x/&-', 'Fußball', 'Fu&AN8-ball', '&AN', '&-AN'))}
    server = serve(t, boxes)
    t.config(clear(t, server))
    for _ in range(2):
        fetched(t, server)
        files = [f for f in os.listdir(t.archive()) if f.endswith('.mbox')]
        assert len(files) == len(boxes), files
        for name, box in boxes.items():
            right = [f for f in files if not archive.compare(os.path.join(t.archive(), f), held(box))]
            assert len(right) == 1, (name, files)


def test_names_spelled_otherwise_later(t):
    """After its provider has moved: the same mailboxes, though INBOX is written and parts are joined in another way."""
    def boxes(names, delimiter):
        return {name: Mailbox(sample.many(2 + i, i), uidvalidity=ord(delimiter), delimiter=delimiter) for i, name in enumerate(names)}
    moves = ('Inbox', 'Inbox/Sent', 'a/b/c', '/'), ('INBOX', 'INBOX.Sent', 'a.b.c', '.'), ('INBOX', 'INBOX\\Sent', 'a\\b\\c', '\\')
    server = serve(t, {})
    t.config(clear(t, server))
    for number, (*names, delimiter) in enumerate(moves):
        server.boxes = boxes(names, delimiter)
        server.boxes[names[2]].add(with_id(b'%d' % number, b'x'))
        said, bodies = fetched(t, server)
        assert len(bodies) == (1 if number else 10), said
        before = archive.digests(t.dest)
        assert len(before) == 3 and not fetched(t, server)[1] and before == archive.digests(t.dest)
    assert [m.state for m in archive.read(t.mbox('a/b/c'))] == [0, 1, 0, 1, 8, 8, 0]


# ---- login ----

def test_logins_refused(t):
    """AUTHENTICATE may be refused for what it is: then LOGIN is tried, once, and never with a wrong password."""
    def refuses(answer, late=False, **more):
        def authenticate(self, tag, args):
            if late and len(args.split()) < 2:
                self.put('+ \r\n')
                self.flush()
                self.take_line()
            self.line('%s %s' % (tag, answer))
        return dict(cmd_AUTHENTICATE=authenticate, **more)

    def wrong(answer=None, **more):
        def cmd_login(self, tag, args):
            self.logins = getattr(self, 'logins', 0) + 1
            if answer is None or self.logins > 1:
                self.server.fault('LOGIN, number %d' % self.logins)
            self.line('%s %s' % (tag, answer or 'NO wrong'))
        return Case(runs=(1,), fails=1, tries=1, skips=('INBOX',), cmd_LOGIN=cmd_login, **more)

    def no_capability(self, tag, args):
        self.line(tag + ' BAD unknown command')

    def asks(times):
        """However much came with the command, it asks so often, and looks at the last answer."""
        def authenticate(self, tag, args):
            for _ in range(times):
                self.put('+ \r\n')
                self.flush()
                code = self.take_line()
            self.enter(tag, *base64.b64decode(code).decode('utf-8', 'surrogateescape').split('\0')[1:])
        return dict(cmd_AUTHENTICATE=authenticate)

    def welcome(self, tag, text='done'):
        Session.ok(self, tag, re.sub(r'\[CAPABILITY.*?\] ', '', text))
    play(t, {
        'bad': Case(tries=1, **refuses('BAD unknown command')),
        'bad-bare': Case(tries=1, capabilities=BARE, **refuses('BAD unknown command')),
        'bad-late': Case(tries=1, capabilities=BARE, **refuses('BAD invalid response', late=True)),
        'cannot': Case(tries=1, **refuses('NO [CANNOT] not here')),
        'no': Case(tries=1, **refuses('NO AUTHENTICATE failed.')),
        'no-late': Case(tries=1, capabilities=BARE, **refuses('NO AUTHENTICATE failed.', late=True)),
        'no-8bit': Case(tries=1, password='pässwörd', **refuses('NO AUTHENTICATE failed.')),
        'failed': wrong(**refuses('NO [AUTHENTICATIONFAILED] wrong')),
        'failed-late': wrong(capabilities=BARE, **refuses('NO [AUTHENTICATIONFAILED] wrong', late=True)),
        'both': wrong('NO wrong', says='wrong', **refuses('NO wrong')),
        'both-bad': wrong('BAD wrong', says='wrong', **refuses('BAD wrong')),
        'disabled': wrong(login='LOGINDISABLED AUTH=PLAIN', **refuses('NO wrong')),
        'asks-again': Case(tries=1, **asks(1)), 'asks-twice': Case(tries=1, capabilities=BARE, **asks(2)),
        'bye': Case(runs=(1,), fails=1, tries=1, skips=('INBOX',), says='wrong password', enter=lambda self, tag, *x: self.bye(
            '[AUTHENTICATIONFAILED] wrong password')),
        'capability': Case(tries=1, cmd_CAPABILITY=no_capability),
        'capability-later': Case(tries=1, cmd_CAPABILITY=no_capability, ok=welcome),
        'capability-bare': Case(tries=1, capabilities=BARE, cmd_CAPABILITY=no_capability, ok=welcome),
    })


def test_a_second_login_refused(t):
    """In words that nobody knows: the first connection, which was let in, does the work."""
    def many():
        return {name: Mailbox(sample.many(150, seed=i)) for i, name in enumerate(('INBOX', 'A', 'B', 'C', 'D', 'E'))}

    def enter(self, tag, user, password):
        with self.server.lock:
            full = any(s.user == user for s in self.server.inside)
            self.user = user
        return self.no(tag, 'already logged in') if full else Session.enter(self, tag, user, password)
    server = serve(t, many(), enter=enter, lag=0.02)
    t.config(clear(t, server), processes_per_account=2)
    fetched(t, server)
    assert len(server.sessions) == 2
    for name, box in server.boxes.items():
        assert not archive.compare(os.path.join(t.archive(), name + '.mbox'), held(box))


# ---- mailboxes ----

def without(*words):
    """EXAMINE without these lines."""
    def examine_lines(self):
        line, self.line = self.line, lambda text: any(w in text for w in words) or Session.line(self, text)
        Session.examine_lines(self)
        self.line = line
    return examine_lines


def test_examine_tells_little(t):
    play(t, {
        'exists': Case(keeps=True, tries=1, examine_lines=without('EXISTS')),
        'exists-bare': Case(keeps=True, tries=1, capabilities=BARE, examine_lines=without('EXISTS')),
        'uidnext': Case(tries=1, examine_lines=without('UIDNEXT')),
        'uidnext-bare': Case(tries=1, capabilities=BARE, examine_lines=without('UIDNEXT')),
        'both': Case(keeps=True, tries=1, examine_lines=without('EXISTS', 'UIDNEXT')),
        'modseq': Case(tries=1, examine_lines=without('MODSEQ')),
    })


def test_no_news_where_examine_tells_no_uidnext(t):
    """As Courier: the UIDNEXT of the STATUS before it may be claimed."""
    for number, capabilities in enumerate((FULL, PLAIN, BARE)):
        boxes = {name: few(3 + i) for i, name in enumerate(('INBOX', 'A', 'B'))}
        server = serve(t, boxes, capabilities=capabilities, examine_lines=without('UIDNEXT'))
        t.config(clear(t, server, email='%d@x' % number))
        fetched(t, server)
        server.forget()
        fetched(t, server)
        assert not server.lines('EXAMINE'), server.lines()
        boxes['A'].add(with_id(b'new', b'x'))
        fetched(t, server)
        assert len(server.lines('EXAMINE')) == 1
        for name, box in boxes.items():
            assert not archive.compare(os.path.join(t.archive('%d@x' % number), name + '.mbox'), held(box))


def forbids(code, *names, status=True):
    def hook(session, tag, name, args):
        if name == 'EXAMINE' or name == 'STATUS' and status:
            if imapd.tokens(args)[0] in names:
                session.box = None
                return session.no(tag, code + ' Permission denied')
    return dict(hook=hook)


def test_no_permission(t):
    """A mailbox that may not be opened is told, and no failure for ever; it leaves no archive."""
    def case(code, status=True, **more):
        return Case(boxes={'INBOX': few(9), 'Public': few(2), 'Public/Minutes': few(3), 'Z': few(2)}, runs=(1, 2, 3),
                    skips=('Public',), says='Public.*ignore_mailboxes', tries=1, **forbids(code, 'Public', status=status),
                    **more)

    def no_status(self, name, box):
        return {} if name == 'Public' else Session.status_values(self, name, box)
    cases = {
        'noperm': case('[NOPERM]'), 'noperm-bare': case('[NOPERM]', capabilities=BARE),
        'nonexistent': case('[NONEXISTENT]'), 'nonexistent-bare': case('[NONEXISTENT]', capabilities=BARE),
        'examine-only': case('[NOPERM]', status=False, capabilities=BARE),
        'listed-without': case('[NOPERM]', status_values=no_status),
    }
    play(t, cases)
    left = [name for name in cases for f in os.listdir(os.path.join(t.dest, name + '@x')) if f.startswith('Public.mbox')]
    assert not left, left


def test_no_permission_for_inbox(t):
    """It is everybody's own: NetEase refuses it to a client that it does not like."""
    server = serve(t, {'INBOX': few(3), 'A': few(2)}, cmd_EXAMINE=lambda self, tag, args: self.no(tag, 'EXAMINE Unsafe Login.'))
    t.config(clear(t, server))
    for _ in range(2):
        assert 'Unsafe Login' in fetched(t, server, status=1)[0]


def test_listings_that_say_nothing(t):
    """How many mails there are tells whether one is missing; of an empty mailbox no listing is needed."""
    def empty(answer):
        def hook(session, tag, name, args):
            if name in ('UID_SEARCH', 'UID_FETCH') and session.box is not None and not session.box.mails:
                session.line(answer.replace('TAG', tag))
                return answer.startswith('TAG')
        return hook

    def boxes():
        return {'INBOX': Mailbox(letters()), 'E': few(0), 'F': few(0)}

    def silent(session, tag, name, args):
        return name == 'UID_SEARCH' and (session.ok(tag) or True)
    cases = {name: Case(boxes=boxes(), tries=1, hook=empty(answer)) for name, answer in {
        'no': 'TAG NO there are no messages', 'bad': 'TAG BAD The specified message set is invalid.', 'zero': '* SEARCH 0',
        'nil': '* SEARCH NIL', 'esearch': '* ESEARCH (TAG "TAG") UID ALL 0'}.items()}
    cases['bad-bare'] = Case(boxes=boxes(), tries=1, capabilities=BARE, hook=empty('TAG BAD no'))
    cases['silent'] = Case(boxes=boxes(), tries=1, hook=silent)
    cases['silent-bare'] = Case(boxes=boxes(), tries=1, capabilities=BARE, hook=silent)
    cases['attributes'] = Case(boxes=boxes(), tries=1, list_line=lambda self, name, box: self.line('* LIST NIL "/" "%s"' % name))
    play(t, cases)
    # Nothing is marked when the listing of a mailbox that is empty now was refused; it is no failure for ever.
    box = Mailbox(letters())
    server = serve(t, {'INBOX': few(2), 'A': box})
    t.config(clear(t, server))
    fetched(t, server)
    box.expunge(*[m.uid for m in box.mails])
    server.hook = empty('TAG NO there are no messages')
    before = archive.digests(t.dest)
    fetched(t, server)
    assert before == archive.digests(t.dest)
    server.hook = lambda session, tag, name, args: 'RETURN' in args and name == 'UID_SEARCH' and session.no(tag, 'no mails')
    assert 'A: 0 new, 12 gone' in fetched(t, server)[0]   # another way lists it


def test_only_what_was_asked_for_is_missing(t):
    """A mail vanished, and SEARCH lists all whatever it is asked for; or nothing, and a mail is looked for again."""
    def lists(uids):
        def search(self, tag, args):
            self.search_line(tag, uids(self) if 'UID ' in args else self.search_uids(), 'RETURN' in args)
            self.ok(tag)
        return search

    def vanishes(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY' in args and imapd.in_set(args.split()[0], 5, 99):
            session.box.expunge(5)
    box = Mailbox(letters())
    server = serve(t, {'INBOX': box}, cmd_UID_SEARCH=lists(Session.search_uids))
    server.hook = vanishes
    t.config(clear(t, server))
    fetched(t, server)
    assert not archive.compare(t.mbox(), held(box))
    box = Mailbox(letters())
    server = serve(t, {'INBOX': box}, cmd_UID_SEARCH=lists(lambda self: []), fetch_mail=lambda self, number, m, items:
                   m.uid == 5 and 'BODY.PEEK[]' in items or Counting.fetch_mail(self, number, m, items))
    t.config(clear(t, server, email='empty@x'))
    fetched(t, server)
    server.session = Counting
    assert len(fetched(t, server)[1]) == 1


def test_no_permission_any_more(t):
    """Where an archive is, it is a failure: that mailbox is no longer backed up."""
    server = serve(t, {'INBOX': few(3), 'Public': few(2)}, capabilities=BARE)
    t.config(clear(t, server))
    fetched(t, server)
    server.boxes['Public'].add(with_id(b'new', b'x'))
    server.hook = forbids('[NOPERM]', 'Public')['hook']
    said = fetched(t, server, status=1)[0]
    assert re.search(r'Public.*NOPERM', said), said


def test_status_makes_no_sense(t):
    """It only saves work: the mailbox is opened, on the same connection."""
    def says(form, capabilities=FULL):
        def status_line(self, name, box, items):
            self.put(form.replace('%s', name) + '\r\n')
        return Case(boxes={'INBOX': few(9), 'A b': few(3), 'C': few(2)}, tries=1, status_line=status_line,
                    capabilities=capabilities)
    forms = {
        'unquoted': '* STATUS %s and more (MESSAGES 3 UIDNEXT 4 UIDVALIDITY 1000)', 'nothing': '* STATUS', 'blank': '* STATUS ',
        'name': '* STATUS "%s"', 'open': '* STATUS "%s" (MESSAGES 3', 'closed': '* STATUS "%s" (MESSAGES 3))',
        'bare': '* STATUS "%s" MESSAGES 3', 'odd': '* STATUS "%s" (MESSAGES)', 'words': '* STATUS "%s" (MESSAGES x UIDNEXT y)',
        'negative': '* STATUS "%s" (MESSAGES -1 UIDNEXT -1 UIDVALIDITY -1)', 'quote': '* STATUS "%s (MESSAGES 3)',
        'huge': '* STATUS "%s" (MESSAGES 99999999999999999999 UIDNEXT 99999999999999999999)',
        'list': '* STATUS ("%s") (MESSAGES 3)', 'nested': '* STATUS "%s" ((MESSAGES 3))', 'other': '* STATUS "not %s" (MESSAGES 0)',
        'nil': '* STATUS "%s" NIL', 'empty': '* STATUS "%s" ()', 'none': '* OK nothing to say of %s',
    }
    play(t, {**{name: says(form) for name, form in forms.items()},
             **{name + '-bare': says(form, BARE) for name, form in forms.items()}})


# ---- mails ----

def closes_early(uid, times=1):
    """The parenthesis of this mail's answer closes behind its UID, so often; the rest follows on the line."""
    left = [times]

    def fetch_mail(self, number, m, items):
        if m.uid != uid or 'BODY.PEEK[]' not in items or left[0] <= 0:
            return Session.fetch_mail(self, number, m, items)
        left[0] -= 1
        parts = self.fetch_items(m, items)
        self.put(b'* %d FETCH (' % number + parts[0] + b') ' + b' '.join(parts[1:]) + b')\r\n')
    return dict(fetch_mail=fetch_mail)


def ends_in(more):
    """Behind the parenthesis of each mail's answer stands this."""
    def fetch_mail(self, number, m, items):
        self.put(b'* %d FETCH (' % number + b' '.join(self.fetch_items(m, items)) + b')' + more + b'\r\n')
    return dict(fetch_mail=fetch_mail)


def test_fetch_closes_early(t):
    play(t, {
        'once': Case(runs=(1,), tries=1, **closes_early(5)), 'first': Case(runs=(1,), tries=1, **closes_early(1)),
        'last': Case(runs=(1,), tries=1, **closes_early(12)),
        'item': Case(tries=1, **ends_in(b' MODSEQ (5))')), 'twice': Case(tries=1, **ends_in(b')')),
        'item-bare': Case(tries=1, capabilities=BARE, **ends_in(b' MODSEQ (5))')),
    })


def apart_from_bodies(self, args):
    """Flags and dates of all mails first, then the mails."""
    words = imapd.tokens(args)
    for items in ([i for i in words[1] if 'BODY' not in i], [i for i in words[1] if 'BODY' in i]):
        for number, m in self.box.inside(words[0]) if 'BODY.PEEK[]' in args else ():
            self.put(b'* %d FETCH (' % number + b' '.join(self.fetch_items(m, items)) + b')\r\n')
    if 'BODY.PEEK[]' not in args:
        Session.fetch(self, args)


def one_by_one(self, number, m, items):
    for item in self.fetch_items(m, items)[1:]:
        self.put(b'* %d FETCH (UID %d ' % (number, m.uid) + item + b')\r\n')


def without_flags(self, m, items):
    return [i for i in Session.fetch_items(self, m, items) if not (i.startswith(b'FLAGS') and 'BODY.PEEK[]' in items)]


def test_mails_in_many_responses(t):
    play(t, {
        'items': Case(tries=1, fetch_mail=one_by_one), 'items-bare': Case(tries=1, capabilities=BARE, fetch_mail=one_by_one),
        'bodies-last': Case(tries=1, fetch=apart_from_bodies),
        'bodies-last-bare': Case(tries=1, capabilities=BARE, fetch=apart_from_bodies),
        'no-flags': Case(tries=1, fetch_items=without_flags), 'no-flags-bare': Case(tries=1, capabilities=BARE, fetch_items=without_flags),
        'peek': Case(tries=1, body=lambda self, name, data: Session.body(self, name.replace(b'BODY[', b'BODY.PEEK['), data)),
    })


def test_flags_apart_from_headers(t):
    """Where UIDVALIDITY is new, too: in a later response, or not at all, so that they are asked for."""
    def no_flags(self, m, items):
        return [i for i in Counting.fetch_items(self, m, items) if not i.startswith(b'FLAGS') or items == ['FLAGS']]
    for number, odd in enumerate((answers('UID BODY', 'UID FLAGS'), dict(fetch_items=no_flags))):
        box, email = Mailbox(sample.many(9)), '%d@x' % number
        server = serve(t, {'INBOX': box}, **odd)
        t.config(clear(t, server, email=email))
        fetched(t, server)
        box.renumber()
        for m in box.mails[::2]:
            box.flag(m.uid, '\\Flagged')
        said, bodies = fetched(t, server)
        complaints = archive.compare(os.path.join(t.archive(email), 'INBOX.mbox'), held(box))
        assert not bodies and not [c for c in complaints if 'state' in c], (complaints, said)


def test_empty_mails(t):
    """However a server writes that nothing is in it."""
    for number, form in enumerate((b'BODY[] NIL', b'BODY[] ""', b'BODY[] {0}\r\n')):
        def fetch_items(self, m, items):
            return [form if i.startswith(b'BODY[]') and not m.data else i for i in Counting.fetch_items(self, m, items)]
        box = Mailbox(letters(4) + [b'', with_id(b'last', b'x')])
        server, email = serve(t, {'INBOX': box}, fetch_items=fetch_items), '%d@x' % number
        t.config(clear(t, server, email=email))
        fetched(t, server)
        before, path = archive.digests(t.dest), os.path.join(t.archive(email), 'INBOX.mbox')
        assert len(archive.read(path)) == 6
        box.renumber()
        fetched(t, server)
        os.unlink(path + '.index')
        fetched(t, server)
        assert before == archive.digests(t.dest)


def untagged_window(n, code='NO'):
    """Only the newest n mails; an untagged response tells it (RFC 9738)."""
    def limited(self, text):
        with self.box.lock:
            uids = [m.uid for m in self.box.mails if text is None or imapd.in_set(text, m.uid, self.box.uidnext - 1)]
        if len(uids) > n:
            self.line('* %s [MESSAGELIMIT %d %d] only so many' % (code, n, uids[-n]))
        return uids[-n:]

    def search(self, tag, args):
        m = re.search(r'UID ([\d:*,]+)', args)
        self.search_line(tag, limited(self, m and m.group(1)), 'RETURN' in args)
        self.ok(tag)

    def fetch(self, tag, args):
        words = args.split(' ', 1)
        uids = limited(self, words[0])
        if uids:
            self.fetch(imapd.ranges(uids) + ' ' + words[1])
        self.ok(tag)
    return dict(cmd_UID_SEARCH=search, cmd_UID_FETCH=fetch,
                capabilities=(FULL + ' MESSAGELIMIT=%d' % n).replace(' ESEARCH', ''))


def test_messagelimit_untagged(t):
    play(t, {name: Case(boxes={'INBOX': Mailbox(letters(25))}, **untagged_window(10, code))
             for name, code in (('no', 'NO'), ('ok', 'OK'))})


def test_messagelimit_below_a_batch(t):
    """What was not looked at is asked for in the same way: no mail is downloaded again, or told as missing."""
    box = Mailbox(letters(25))
    server = serve(t, {'INBOX': box}, **untagged_window(10))
    t.config(clear(t, server))
    fetched(t, server)
    box.renumber()
    assert not fetched(t, server)[1]
    t.backup('--verify', '--online')
    assert not archive.compare(t.mbox(), held(box))


def test_dates_that_cannot_be(t):
    """The Date header's day is taken then, else 1970: readers sort by it."""
    day = sample.T0 // 86400 * 86400
    y, m, d = sample.civil(day // 86400)
    month = sample.MONTHS[m - 1]
    dates = [(b'%d %s %04d 10:00:00 +0000' % (d, month.encode(), y), day + 36000),
             (b'Fri, %02d %s %04d 10:00:07 +0130' % (d, month.encode(), y), day + 36007 - 5400),
             (b'%02d %s %04d 10:00 -0500' % (d, month.encode(), y), day + 36000 + 18000),
             (b'%02d %s %04d 10:00:00 GMT' % (d, month.encode(), y), day + 36000),
             (b'%02d %s %04d 10:00:00 +0000 (UTC)' % (d, month.encode(), y), day + 36000),
             (b'\r\n\tFri, %02d %s\r\n %04d 10:00:00 +0000' % (d, month.encode(), y), day + 36000),
             (b'yesterday', 0), (b'', 0), (b'99 Jan 2020 10:00:00 +0000', 0), (None, 0)]

    def boxes():
        return {'INBOX': Mailbox([sample.Mail(with_id(b'd%d' % i, b'x', *([b'Date: ' + text] if text is not None else [])),
                                              '', when) for i, (text, when) in enumerate(dates)])}

    def says(date):
        def fetch_items(self, m, items):
            out = [(date and b'INTERNALDATE ' + date) if i.startswith(b'INTERNALDATE') else i
                   for i in Session.fetch_items(self, m, items)]
            return [i for i in out if i]
        return Case(boxes=boxes(), runs=(1,), tries=1, fetch_items=fetch_items)
    play(t, {
        'zero': says(b'"00-Jan-0000 00:00:00 +0000"'), 'nil': says(b'NIL'), 'missing': says(None), 'empty': says(b'""'),
        'rfc2822': says(b'"Fri, 03 Jan 2020 10:00:00 +0000"'), 'zone': says(b'"17-Jul-2021 02:44:25 +9999"'),
        'february': says(b'"31-Feb-2021 02:44:25 +0000"'),
        'clock': says(b'"17-Jul-2021 25:61:61 +0000"'), 'month': says(b'"17-Foo-2021 02:44:25 +0000"'),
    })


def test_a_date_in_a_later_response(t):
    play(t, {
        'behind': Case(**answers('UID FLAGS BODY', 'UID INTERNALDATE')),
        'behind-flags': Case(**answers('UID BODY', 'UID INTERNALDATE FLAGS')),
        'both': Case(**answers('UID BODY', 'UID INTERNALDATE', 'UID FLAGS')),
    })


def test_replaced_mails(t):
    """A draft that is edited keeps its Message-ID: the new text is stored, and the old one is gone."""
    def sizes(wrong):
        def fetch_items(self, m, items):
            return [b'RFC822.SIZE %d' % wrong(m.data) if i.startswith(b'RFC822') else i
                    for i in Counting.fetch_items(self, m, items)]
        return dict(fetch_items=fetch_items)
    texts = b'first words', b'first words, and the rest of the letter', b'short'
    apart = answers('UID FLAGS INTERNALDATE BODY', 'UID RFC822.SIZE')   # too late: nobody knows the size
    servers_ = {'full': {}, 'bare': dict(capabilities=BARE), 'plain': dict(capabilities=PLAIN), 'apart': apart,
                'apart-bare': dict(apart, capabilities=BARE)}
    for keep in False, True:
        for name, odd in servers_.items():
            box = Mailbox([with_id(b'draft', texts[0]), with_id(b'other', b'x'), with_id(b'third', b'y')])
            server, email = serve(t, {'INBOX': few(2), 'Drafts': box}, **odd), '%s%d@x' % (name, keep)
            path = os.path.join(t.archive(email), 'Drafts.mbox')
            t.config(clear(t, server, email=email), keep_duplicates=keep)
            fetched(t, server)
            old, uid = [], 1
            for text in texts[1:]:
                old.append(held(box)[[m.uid for m in box.mails].index(uid)])
                box.expunge(uid)
                uid = box.add(with_id(b'draft', text))
                said, bodies = fetched(t, server)
                assert len(bodies) == 1, (email, said)
                complaints = archive.compare(path, held(box), duplicates=True, gone=old)
                assert not complaints, (email, complaints, said)
            before = archive.digests(t.dest)
            os.unlink(path + '.index')
            said, bodies = fetched(t, server)
            assert (not bodies or 'apart' in name) and before == archive.digests(t.dest), (email, said)
    # Only its UID is new: it is what is stored, also where the server's sizes are wrong.
    for name, odd in {'same': {}, 'lf': sizes(lambda data: len(data.replace(b'\r\n', b'\n'))), 'one': sizes(lambda data: 1),
                      'apart': apart}.items():
        box = Mailbox([with_id(b'draft', texts[0]), with_id(b'other', b'x')])
        server, email = serve(t, {'INBOX': box}, **odd), name + '@x'
        t.config(clear(t, server, email=email))
        fetched(t, server)
        box.expunge(1)
        box.add(with_id(b'draft', texts[0]))
        for _ in range(2):
            said, bodies = fetched(t, server)
            complaints = archive.compare(os.path.join(t.archive(email), 'INBOX.mbox'), held(box))
            assert not complaints, (name, complaints)
        assert not bodies, 'fetched in every run'


def test_a_draft_whose_old_text_stays_for_a_while(t):
    """Both are listed in one run, only the new one in the next: then that is stored."""
    for number, capabilities in enumerate((FULL, BARE)):
        box = Mailbox([with_id(b'draft', b'one'), with_id(b'other', b'x')])
        server, email = serve(t, {'INBOX': box}, capabilities=capabilities), '%d@x' % number
        t.config(clear(t, server, email=email))
        fetched(t, server)
        old = held(box)[:1]
        box.add(with_id(b'draft', b'one, and the last words'))
        assert 'keep_duplicates' in fetched(t, server)[0]
        box.expunge(1)
        said, bodies = fetched(t, server)
        complaints = archive.compare(os.path.join(t.archive(email), 'INBOX.mbox'), held(box), duplicates=True, gone=old)
        assert not complaints and len(bodies) == 1, (complaints, said)
        assert not fetched(t, server)[1]


def test_other_mails_under_one_id(t):
    """Left out as duplicates, but of another size: told once."""
    box = Mailbox([with_id(b'one', b'x'), with_id(b'one', b'something else'), with_id(b'one', b'x'), with_id(b'two', b'y')])
    server = serve(t, {'INBOX': box, 'Same': Mailbox([with_id(b'one', b'x')] * 3)})
    t.config(clear(t, server))
    said = fetched(t, server)[0]
    warnings = [line for line in said.splitlines() if 'keep_duplicates' in line]
    assert len(warnings) == 1 and 'INBOX' in warnings[0] and re.search(r'\b1\b', warnings[0]), said
    assert 'keep_duplicates' not in fetched(t, server)[0]
    box.add(with_id(b'three', b'z'))
    said = t.backup('-v').err
    assert 'keep_duplicates' not in said and '1 mails are left out' in said, said


def test_which_of_several_mails_with_one_identity(t):
    """Where no UID is known, those bind first whose sizes fit: what is stored is neither stored again nor taken for another."""
    for number in range(8):
        keep, lost, made, email = number & 1, number & 2, number & 4, '%d@x' % number
        first, second = (b'Subject: same\r\n\r\n%s\r\n' % x if made else with_id(b'one', x) for x in (b'the first', b'quite another one'))
        box = Mailbox([with_id(b'two', b'y'), first, with_id(b'three', b'z')])
        server = serve(t, {'INBOX': box})
        t.config(clear(t, server, email=email), keep_duplicates=bool(keep))
        fetched(t, server)
        box.expunge(2)
        box.add(second)
        box.add(first)
        if lost:
            os.unlink(os.path.join(t.archive(email), 'INBOX.mbox.index'))
        else:
            box.renumber()
        said, bodies = fetched(t, server)
        path, every = os.path.join(t.archive(email), 'INBOX.mbox'), keep or made
        complaints = archive.compare(path, held(box), duplicates=every)
        assert not complaints and bodies == ([second] if every else []), (email, complaints, bodies, said)
        assert every or 'keep_duplicates' in said, said
        t.backup('--verify', '--online')
        before = archive.digests(t.dest)
        assert not fetched(t, server)[1] and before == archive.digests(t.dest)


def test_uids_used_again(t):
    """A mailbox made anew with the UIDVALIDITY of the old one: UIDNEXT tells it, and Message-IDs decide."""
    for name, odd in {'full': {}, 'plain': dict(capabilities=PLAIN), 'bare': dict(capabilities=BARE),
                      'status': dict(examine_lines=without('UIDNEXT')),
                      'status-bare': dict(capabilities=BARE, examine_lines=without('UIDNEXT')),
                      'examine': dict(capabilities=BARE, cmd_STATUS=lambda self, tag, args: self.no(tag, 'no STATUS'))}.items():
        for n in 0, 1, 3:   # mails of the old mailbox that are in the new one
            old = Mailbox(letters(7))
            new = Mailbox([sample.Mail(m.data, ' '.join(m.flags), m.when) for m in old.mails[3:3 + n]])
            for i in range(2):
                new.add(with_id(b'new%d' % i, b'x'))
            server, email = serve(t, {'INBOX': old, 'Z': few(2)}, **odd), '%s%d@x' % (name, n)
            t.config(clear(t, server, email=email))
            fetched(t, server)
            server.boxes['INBOX'] = new
            said, bodies = fetched(t, server)
            gone = [m for i, m in enumerate(held(old)) if not 3 <= i < 3 + n]
            complaints = archive.compare(os.path.join(t.archive(email), 'INBOX.mbox'), held(new), gone=gone)
            assert not complaints and len(bodies) == 2, (email, complaints, len(bodies), said)
            before = archive.digests(t.dest)
            said, bodies = fetched(t, server)
            assert not bodies and before == archive.digests(t.dest), (email, said)


def test_uids_are_bound_bit_by_bit(t):
    """A new UIDVALIDITY, and a line that breaks at each second question: what was bound stays so, and is progress."""
    def hook(session, tag, name, args):
        if 'HEADER.FIELDS (MESSAGE-ID' in args:
            session.asked = getattr(session, 'asked', 0) + 1
            if session.asked > 1:
                session.drop('close')
    box = Mailbox(sample.many(9))
    server = serve(t, {'INBOX': box})
    t.config(clear(t, server), header_batch_size=3, retries=2)
    fetched(t, server)
    box.renumber()
    box.flag(box.mails[3].uid, '\\Flagged')
    server.hook = hook
    said, bodies = fetched(t, server)
    assert not bodies and not archive.compare(t.mbox(), held(box)), said


def test_what_was_bound_is_progress_once(t):
    """A server that goes away behind it is tried `retries` times, and not for ever."""
    greetings = []

    def greet(self):
        greetings.append(1)
        return self.drop('close') if len(greetings) in range(3, 20) else Session.greet(self)

    def hook(session, tag, name, args):
        if 'HEADER.FIELDS (MESSAGE-ID' in args:
            session.asked = getattr(session, 'asked', 0) + 1
            if session.asked > 4:   # the first three are about UIDs that there are no more
                session.flush()
                session.drop('close')
    box = Mailbox(sample.many(9))
    server = serve(t, {'INBOX': box}, greet=greet)
    t.config(clear(t, server), header_batch_size=3, retries=1)
    fetched(t, server)
    box.renumber()
    server.hook = hook
    said, _ = fetched(t, server, status=1)
    assert len(greetings) == 3 and said.count('trying again') == 1, said


def test_other_uids_at_each_examine(t):
    """As GNU's imap4d: such a mailbox is alone on the wire, and Message-IDs decide."""
    for number, (capabilities, validity) in enumerate(((FULL, 0), (BARE, 0), (FULL, 1), (BARE, 1))):
        def cmd_EXAMINE(self, tag, args):
            box = self.boxes[imapd.tokens(args)[0]]
            box.renumber(box.uidvalidity + validity)
            Session.cmd_EXAMINE(self, tag, args)
        boxes = {name: Mailbox(sample.many(40, seed=i)) for i, name in enumerate(('INBOX', 'A', 'B'))}
        server, email = serve(t, boxes, cmd_EXAMINE=cmd_EXAMINE, capabilities=capabilities), '%d@x' % number
        t.config(clear(t, server, email=email, processes_per_account=1), header_batch_size=7, email_batch_size=5)
        for run in range(3):
            said, bodies = fetched(t, server)
            assert len(bodies) == (120 if run == 0 else 0), (run, len(bodies), said)
            for name, box in boxes.items():
                assert not archive.compare(os.path.join(t.archive(email), name + '.mbox'), held(box)), said


def test_a_uidnext_that_never_changes(t):
    """One that is not above all UIDs is no news, and no "no news"."""
    box = Mailbox([sample.Mail(with_id(b'%d' % i, b'x'), '\\Seen', sample.T0) for i in range(8)])
    server = serve(t, {'INBOX': box}, capabilities=BARE, line=lambda self, text: Session.line(
        self, re.sub(r'UIDNEXT \d+', 'UIDNEXT 1', text)))
    t.config(clear(t, server))
    fetched(t, server)
    gone = [held(box)[1]]
    box.expunge(2)
    box.add(with_id(b'new', b'x'), '\\Seen')
    assert len(fetched(t, server)[1]) == 1
    assert not archive.compare(t.mbox(), held(box), gone=gone)


def test_a_highestmodseq_that_went_back(t):
    """A server whose index was made anew: nobody knows what has changed, so all flags are asked for."""
    for number, capabilities in enumerate((FULL, FULL.replace('LIST-STATUS ', ''))):
        box = Mailbox(letters())
        box.modseq = 500
        server, email = serve(t, {'INBOX': box}, capabilities=capabilities), '%d@x' % number
        t.config(clear(t, server, email=email))
        fetched(t, server)
        box.modseq = 1
        for m in box.mails:
            m.modseq = 1
        box.flag(3, '\\Seen \\Answered')
        for _ in range(2):
            said, bodies = fetched(t, server)
            assert not bodies and not archive.compare(os.path.join(t.archive(email), 'INBOX.mbox'), held(box)), said


# ---- servers that break ----

def test_uids_that_are_never_the_same(t):
    """Each connection has a new UIDVALIDITY, and breaks after some Message-IDs: nothing of that lasts, and it ends."""
    def cmd_EXAMINE(self, tag, args):
        self.boxes['INBOX'].renumber()
        Session.cmd_EXAMINE(self, tag, args)

    def hook(session, tag, name, args):
        if 'HEADER.FIELDS (MESSAGE-ID' in args:
            session.asked = getattr(session, 'asked', 0) + 1
            if session.asked > 2:
                session.drop('close')
    box = Mailbox(sample.many(60))
    server = serve(t, {'INBOX': box}, cmd_EXAMINE=cmd_EXAMINE)
    t.config(clear(t, server), header_batch_size=7, retries=2)
    fetched(t, server)
    box.add(with_id(b'new', b'x'))
    server.hook = hook
    server.forget()
    fetched(t, server, status=1)
    assert len(server.sessions) < 9
    server.hook = None
    assert len(fetched(t, server)[1]) == 1 and not archive.compare(t.mbox(), held(box))


def hangs_up(how, first=False):
    """It ends the connection when a second command comes before the first one is answered; first: after that answer."""
    def one(self):
        self.need(lambda data: True if b'\n' in data else None)
        while select.select([self.sock], [], [], 0.02)[0]:
            got = self.sock.recv(1 << 16)
            if not got:
                raise imapd.Gone
            self.input += got
        second = self.input.count(b'\n') > 1
        if not second or first:
            Session.one(self)
        if second:
            self.drop(how)
    return dict(one=one)


def test_a_second_command_ends_the_connection(t):
    """After two such cuts there is one command at a time, for the rest of the run."""
    def boxes():
        return {'INBOX': Mailbox(letters()), **{'b%d' % i: few(2 + i) for i in range(4)}}
    play(t, {
        'rst': Case(boxes=boxes(), tries=4, **hangs_up('rst')), 'close': Case(boxes=boxes(), tries=4, **hangs_up('close')),
        'answered': Case(boxes=boxes(), tries=4, **hangs_up('close', first=True)),
        'bare': Case(boxes=boxes(), tries=4, capabilities=BARE, **hangs_up('rst')),
        'login': Case(boxes=boxes(), tries=4, login='', **hangs_up('rst')),
    }, retries=3)


def test_a_header_that_breaks_the_line_proves_nothing(t):
    """Which of the stored mails it is nobody knows where UIDVALIDITY is new, or the index lost: none is marked."""
    for number, lost in enumerate((False, True)):
        box, email = Mailbox(sample.many(9)), '%d@x' % number
        server = serve(t, {'INBOX': box})
        path = os.path.join(t.archive(email), 'INBOX.mbox')
        t.config(clear(t, server, email=email), retries=3)
        fetched(t, server)
        box.renumber()
        if lost:
            os.unlink(path + '.index')
        poison = box.mails[4].uid
        server.hook = lambda session, tag, name, args: 'BODY' in args and imapd.in_set(
            args.split()[0], poison, 99) and session.drop('rst')
        for _ in range(2):
            fetched(t, server, status=1)
            assert not archive.compare(path, held(box))
        server.hook = None
        assert not fetched(t, server)[1] and not archive.compare(path, held(box))


def test_failures_are_counted_once(t):
    """Mails that never come, more ranges of them than a command holds, while another mail goes on under a second UID."""
    def fetch_mail(self, number, m, items):
        if m.uid < 5 or m.uid % 2 or 'BODY.PEEK[]' not in items:
            Session.fetch_mail(self, number, m, items)
    box = Mailbox([with_id(b'one', b'x'), with_id(b'two', b'y'), with_id(b'one', b'x')])
    server = serve(t, {'INBOX': box}, fetch_mail=fetch_mail)
    t.config(clear(t, server))
    fetched(t, server)
    box.expunge(1)
    for i in range(300):
        box.add(with_id(b'new%d' % i, b'z'))
    said = fetched(t, server, status=1)[0]
    assert said.count('could not be fetched') == 1 and '149 FAILED' in said, said


def test_a_search_that_breaks_the_server(t):
    """UID FETCH 1:* (UID) lists as well."""
    def case(act, **more):
        return Case(tries=5, **always('^UID_SEARCH', act), **more)
    play(t, {
        'rst': case(drop('rst')), 'close': case(drop('close')), 'bare': case(drop('close'), capabilities=BARE),
        'bad': case(lambda session, tag, args='': session.line(tag + ' BAD internal error')),
        'bad-bare': case(lambda session, tag, args='': session.line(tag + ' BAD internal error'), capabilities=BARE),
    }, retries=3)


def test_what_only_saves_work_breaks_the_server(t):
    """It is left out then."""
    def case(pattern, how, **more):
        return Case(boxes={'INBOX': Mailbox(letters()), 'A': few(3), 'B': few(2)}, tries=4, **always(pattern, how), **more)
    play(t, {
        'status': case('^STATUS "A"', drop('close'), capabilities=BARE), 'status-rst': case('^STATUS', drop('rst'), capabilities=BARE),
        'list-status': case('^LIST.*STATUS', drop('close')), 'condstore': case('^EXAMINE.*CONDSTORE', drop('close')),
        'changedsince': case('^UID_FETCH.*CHANGEDSINCE', drop('rst')),
        'namespace': case('^NAMESPACE', drop('close'), capabilities=FULL + ' NAMESPACE'),
    }, retries=3)


def test_special_uses_are_known_after_a_break(t):
    """Where they are told only if they are asked for (RFC 6154), and the line breaks at LIST with STATUS."""
    def cmd_list(self, tag, args):
        self.uses = 'SPECIAL-USE' in args
        if 'STATUS (' in args:
            return self.drop('close')
        return Session.cmd_LIST(self, tag, args)

    def list_line(self, name, box):
        self.line('* LIST (%s) "/" %s' % (box.attributes if self.uses else '', name))
    server = serve(t, {'INBOX': few(3), 'Spam': Mailbox(few(2).mails, attributes='\\Junk')}, cmd_LIST=cmd_list, list_line=list_line)
    t.config(clear(t, server, ignore_mailboxes=['\\Junk']), retries=2)
    t.backup()
    assert os.listdir(t.archive()) and not os.path.exists(t.mbox('Spam')), os.listdir(t.archive())


def fields_as_asked(data, names):
    asked = {name.lower(): name.encode() for name in names.split()}
    return re.sub(rb'(?m)^([A-Za-z-]+)(?=:)', lambda m: asked.get(m.group(1).decode().lower(), m.group(1)),
                  imapd.header_fields(data, names))


def test_field_names_as_they_were_asked_for(t):
    """As GNU's imap4d answers HEADER.FIELDS. Mails without a Message-ID are those that they were."""
    def fetch_body(self, m, item):
        fields = re.match(r'BODY\.PEEK\[HEADER\.FIELDS \((.*)\)\]$', item)
        if not fields:
            return Counting.fetch_body(self, m, item)
        return self.body(b'BODY[HEADER.FIELDS (%s)]' % fields.group(1).encode(), fields_as_asked(m.data, fields.group(1)))
    box = Mailbox([sample.mail(random.Random(i), 'capitals %d' % i, message_id=i % 2) for i in range(12)])
    for number, capabilities in enumerate((FULL, BARE)):
        server, email = serve(t, {'INBOX': box}, capabilities=capabilities, fetch_body=fetch_body), '%d@x' % number
        path = os.path.join(t.archive(email), 'INBOX.mbox')
        t.config(clear(t, server, email=email))
        assert len(fetched(t, server)[1]) == len(box.mails)
        before = archive.digests(t.dest)
        for what in 'same', 'UIDVALIDITY', 'index', 'index and new mail':
            if what == 'UIDVALIDITY':
                box.renumber()
            if 'index' in what:
                os.unlink(path + '.index')
            if 'new' in what:
                box.add(with_id(b'new%d' % number, b'x'))
            said, bodies = fetched(t, server)
            assert len(bodies) == ('new' in what) and ('new' in what or before == archive.digests(t.dest)), (what, len(bodies), said)
        assert len(archive.read(path)) == len(box.mails)


def test_sizes_without_cr(t):
    """Courier's SEARCH LARGER counts LF alone: a lost index costs no mail. Where RFC822.SIZE does so too, or a mail
    has a bare LF, its length cannot tell whether it is torn; but nothing that is stored is stored again."""
    def search(self, tag, args):
        m = re.match(r'(RETURN \(ALL\) )?UID ([\d:*,]+) LARGER (\d+) SMALLER (\d+)$', args)
        if not m:
            return Session.cmd_UID_SEARCH(self, tag, args)
        uids = [x.uid for x in self.box.mails if imapd.in_set(m.group(2), x.uid, self.box.uidnext - 1) and
                int(m.group(3)) < len(x.data.replace(b'\r\n', b'\n')) < int(m.group(4))]
        self.search_line(tag, uids, bool(m.group(1)))
        self.ok(tag)

    def short(self, m, items):
        return [b'RFC822.SIZE %d' % len(m.data.replace(b'\r\n', b'\n')) if i.startswith(b'RFC822') else i
                for i in Counting.fetch_items(self, m, items)]
    for number, odd in enumerate((dict(cmd_UID_SEARCH=search), dict(cmd_UID_SEARCH=search, capabilities=BARE),
                                  dict(cmd_UID_SEARCH=search, fetch_items=short))):
        boxes, email = {'INBOX': Mailbox(letters()), 'A': few(3)}, '%d@x' % number
        server = serve(t, boxes, **odd)
        t.config(clear(t, server, email=email))
        fetched(t, server)
        before = archive.digests(t.dest)
        for name in boxes:
            os.unlink(os.path.join(t.archive(email), name + '.mbox.index'))
        said, bodies = fetched(t, server)
        assert before == archive.digests(t.dest), said
        assert not bodies or 'fetch_items' in odd, said
    box = Mailbox([*letters(3), with_id(b'bare', b'one\ntwo\nthree\r\n\nfour')])
    server = serve(t, {'INBOX': box})
    t.config(clear(t, server))
    fetched(t, server)
    before = archive.digests(t.dest)
    os.unlink(t.mbox() + '.index')
    said, bodies = fetched(t, server)
    assert before == archive.digests(t.dest), said


# ---- configuration ----

def test_host_with_a_port_or_a_scheme(t):
    """What people paste; told before anything is contacted."""
    for host in ('imap.example.org:993', 'imaps://imap.example.org', 'imap://imap.example.org:143/', 'imap.example.org/INBOX',
                 '[::1]:993', '127.0.0.1:143', 'https://imap.example.org'):
        t.config(t.account(host=host), retries=0)
        for args in ((), ('--check',)):
            got = t.run(*args)
            assert got.status == 2 and 'host' in got.err and not os.path.exists(t.dest), (host, got)
    server = Server({'INBOX': few(2)}, address='::1')
    t.cleanups.append(server.stop)
    for host in '::1', 'localhost.':
        t.config(clear(t, server, host='::1') if host == '::1' else t.account(host=host, port=1), retries=0)
        assert t.run('--check').status == (0 if host == '::1' else 1), host


FAILING_SEND = '''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

ssize_t send(int fd, const void *octets, size_t n, int flags)
{
	ssize_t (*real)(int, const void *, size_t, int) = dlsym(RTLD_NEXT, "send");

	if (memmem(octets, n, "CHANGEDSINCE", 12) == NULL)
		return real(fd, octets, n, flags);
	errno = ETIMEDOUT;
	return -1;
}
'''


def test_flags_that_could_not_be_asked_for_are_not_claimed(t):
    """The line breaks at CHANGEDSINCE: the run fails, and the next one asks again."""
    library, box = os.path.join(t.folder, 'send.so'), Mailbox(sample.many(10))
    with open(library + '.c', 'w') as f:
        f.write(FAILING_SEND)
    servers.tool('cc', '-shared', '-fPIC', '-o', library, library + '.c', '-ldl')
    server = serve(t, {'INBOX': box}, capabilities=FULL.replace('LIST-STATUS ', ''),
                   cmd_STATUS=lambda self, tag, args: self.no(tag, 'not today'))
    t.config(clear(t, server), retries=1)
    t.backup()
    box.flag(3, '\\Seen \\Answered \\Flagged')
    t.backup(status=1, env={'LD_PRELOAD': library})
    t.backup()
    assert archive.read(t.mbox())[2].state == 7
