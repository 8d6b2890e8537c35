"""COMPRESS=DEFLATE: the decoder against zlib's output of many kinds; the program against Dovecot and
a scripted server that compress."""
import os
import random
import re
import struct
import subprocess
import zlib

import archive
import imapd
import sample
from run import HERE, TOP
from test_backup import few, fill

LEVELS = [(level, zlib.Z_DEFAULT_STRATEGY) for level in range(10)]
STRATEGIES = [(6, s) for s in (zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED)]


# -- the decoder alone --

def pack(pieces, level=6, strategy=zlib.Z_DEFAULT_STRATEGY, flush=zlib.Z_SYNC_FLUSH, memory=8):
    """One raw stream, flushed after each piece."""
    c = zlib.compressobj(level, zlib.DEFLATED, -15, memory, strategy)
    return b''.join(c.compress(p) + c.flush(flush) for p in pieces)


def texts():
    rng = random.Random(7)
    base64 = sample.with_attachment(rng, 'a', 30000).data
    return {
        'empty': b'', 'one': b'x', 'two': b'xy', 'same': b'a' * 700, 'all': bytes(range(256)) * 3,
        'mail': sample.mail(rng, 'm').data, 'noise': rng.randbytes(3000), 'base64': base64,
        'words': sample.text(rng, 120_000).encode(), 'zeros': bytes(300_000),
        'skewed': bytes(min(255, int(rng.expovariate(.1))) for _ in range(60_000)),
    }


def streams():
    """(name, stream, what it stands for)"""
    rng = random.Random(8)
    for name, text in texts().items():
        for level, strategy in LEVELS + STRATEGIES:
            yield '%s, level %d, strategy %d' % (name, level, strategy), pack([text], level, strategy), text
    text = texts()['mail']
    for n in (1, 7, 100):   # a flush at every border
        pieces = [text[at:at + n] for at in range(0, len(text), n)]
        for flush in (zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK):
            yield '%d octets, flush %d' % (n, flush), pack(pieces + [b''], flush=flush), text
    yield 'nothing but flushes', pack([b''] * 20), b''
    yield 'the end', pack([text], flush=zlib.Z_FINISH), text
    for memory in (1, 9):
        yield 'memory %d' % memory, pack([texts()['words']], memory=memory), texts()['words']
    # Matches from the window's far end, over its border, and of the greatest length.
    for distance in (1, 2, 257, 258, 259, 32000, 32767, 32768):
        run = rng.randbytes(distance)
        text = (run * (70_000 // distance + 2))[:max(70_000, 2 * distance)]
        yield 'distance %d' % distance, far(run, len(text)), text
        if distance < 32000:
            yield 'distance %d by zlib' % distance, pack([text], 9), text
    for piece in (32767, 32768, 32769):
        text = rng.randbytes(piece) + b'border' * 50 + rng.randbytes(piece)
        yield 'wrap at %d' % piece, pack([text], 6), text
    mixed = [rng.randbytes(100) if rng.random() < .5 else sample.text(rng, 2000).encode() for _ in range(60)]
    c = zlib.compressobj(9, zlib.DEFLATED, -15)
    stored = zlib.compressobj(0, zlib.DEFLATED, -15)
    stream = b''.join((c.compress(p) + c.flush(zlib.Z_FULL_FLUSH)) if i % 2 else
                      (stored.compress(p) + stored.flush(zlib.Z_SYNC_FLUSH)) for i, p in enumerate(mixed))
    yield 'stored and other blocks', stream, b''.join(mixed)


def far(run, octets):
    """A fixed block that repeats a run of octets by matches of 258 at the distance of its length, which
    zlib itself never goes beyond 32506 for."""
    bits = []

    def put(value, n):
        bits.extend(value >> i & 1 for i in range(n))

    def code(value, n):
        bits.extend(value >> (n - 1 - i) & 1 for i in range(n))

    put(0, 1)
    put(1, 2)
    for c in run:
        code(*((0x30 + c, 8) if c < 144 else (0x190 + c - 144, 9)))
    left, d = octets - len(run), len(run) - 1
    while left > 0:
        n = 258 if left > 260 or left == 258 else min(left, 255)
        if 0 < left - n < 3:
            n -= 3
        if n < 3:   # as literals
            for c in (run * 2)[(octets - left) % len(run):][:n]:
                code(*((0x30 + c, 8) if c < 144 else (0x190 + c - 144, 9)))
            left -= n
            continue
        if n == 258:
            code(0xC0 + 285 - 280, 8)
        else:
            symbol, more, rest = value_code(n - 3, 4)
            symbol += 257
            code(*((symbol - 256, 7) if symbol < 280 else (0xC0 + symbol - 280, 8)))
            put(rest, more)
        symbol, more, rest = value_code(d, 2)
        code(symbol, 5)
        put(rest, more)
        left -= n
    code(0, 7)
    put(0, 3)   # an empty stored block: the flush
    bits.extend([0] * (-len(bits) % 8))
    return bytes(sum(b << i for i, b in enumerate(bits[at:at + 8])) for at in range(0, len(bits), 8)) + \
        b'\0\0\xff\xff'


def value_code(value, group):
    """(symbol, bits, their value) for a length or distance, counted from 0."""
    if value < 2 * group:
        return value, 0, 0
    more = (value // group).bit_length() - 1
    return group * (more + 1) + (value >> more) % group, more, value & ((1 << more) - 1)


def compile_c(program, source, *flags):
    subprocess.run([os.environ.get('CC', 'cc'), '-std=c11', '-D_POSIX_C_SOURCE=200809L', '-D_DEFAULT_SOURCE',
                    '-D_FILE_OFFSET_BITS=64', '-I', TOP, *flags, '-o', program, source,
                    os.path.join(TOP, 'json.c'), os.path.join(TOP, 'mbox.c'), '-lbearssl', '-lcurl'],
                   check=True)


def test_streams_of_zlib(t):
    """Every kind of block, level and strategy; in pieces, cut at every octet, damaged bit by bit."""
    path = os.path.join(t.folder, 't_inflate')
    compile_c(path, os.path.join(HERE, 't_inflate.c'), '-g', '-O1', '-fsanitize=address,undefined',
              '-fno-sanitize-recover=undefined')
    records = b''
    n = 0
    for name, stream, text in streams():
        whole = zlib.decompressobj(-15).decompress(stream)
        assert whole == text, name
        for part in (name.encode(), stream, whole):
            records += struct.pack('=I', len(part)) + part
        n += 1
    done = subprocess.run([path, 'check'], input=records, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=280)
    text = done.stdout.decode(errors='replace')
    assert done.returncode == 0 and '%d streams' % n in text, text[-3000:]


# -- the program --

def asked(got):
    return len(re.findall(r'C: \S+ COMPRESS DEFLATE', got.err))


def octets_in(got):
    return sum(int(n) for n in re.findall(r'(\d+) octets in', got.err))


def test_dovecot_compresses(t):
    """The same archives with and without, over TLS, STARTTLS and in the clear; fewer octets."""
    server = t.dovecot('-compress', compress=True)
    held = fill(t, sample.boxes(mails=60), server)
    found = {}
    for mode, more in (('tls', {}), ('plain', {}), ('plain', {'ssl': False, 'host': '127.0.0.1'})):
        for compress in (None, False, True):
            t.dest = os.path.join(t.folder, 'backup-%s-%d-%s' % (mode, len(more), compress))
            # One command a mailbox: the server mixes the mails of several, each time in another way.
            t.config(t.account(server, mode, **more), email_batch_size=1000,
                     **({} if compress is None else {'compress': compress}))
            got = t.backup('-vv')
            assert (asked(got) > 0) == (compress is True), got.err
            assert 'does not compress' not in got.err
            t.same(held)
            found[t.dest] = archive.digests(t.dest), octets_in(got)
            if compress:
                assert octets_in(got) < .9 * plain, (octets_in(got), plain)
            plain = octets_in(got)
            assert '0 new' in t.backup('-v').err
    digests = [d for d, _ in found.values()]
    assert all(d == digests[0] for d in digests)


class Socket:
    """A socket whose recv() inflates."""
    def __init__(self, sock):
        self.sock, self.inflate = sock, zlib.decompressobj(-15)

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def recv(self, n):
        while True:
            got = self.sock.recv(n)
            data = self.inflate.decompress(got)
            if data or not got:
                return data


class Session(imapd.Session):
    """Compresses. damage(stream, sent): changes what goes out; extra: sent with the OK, compressed."""
    capabilities = imapd.FULL + ' COMPRESS=DEFLATE'
    deflate, level, strategy, extra = None, 6, zlib.Z_DEFAULT_STRATEGY, ''

    def cmd_COMPRESS(self, tag, args):
        if args != 'DEFLATE' or self.deflate or self.input:
            self.server.fault('COMPRESS %s, then %r' % (args, self.input))
        self.start(tag)

    def start(self, tag):
        self.ok(tag)
        ok, self.output = self.output, b''
        self.deflate = zlib.compressobj(self.level, zlib.DEFLATED, -15, 8, self.strategy)
        self.sock = Socket(self.sock)
        if self.extra:
            self.put(self.extra)
            self.output = self.packed()
        self.output = ok + self.output
        super().flush()

    def packed(self):
        data = self.deflate.compress(self.output) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
        return self.damage(data)

    def damage(self, data):
        return data

    def flush(self):
        if self.deflate and self.output:
            self.output = self.packed()
        super().flush()


def scripted(t, server, **more):
    t.config(t.account(server, 'plain', ssl=False, host='127.0.0.1'),
             **dict({'compress': True, 'retries': 0, 'processes_per_account': 1}, **more))


def boxes():
    return {'INBOX': imapd.Mailbox(few(20)), 'A': imapd.Mailbox([m for _, m in sample.awkward()])}


def stored(t):
    """What the archives hold; a connection that broke may have changed the order."""
    return {name: sorted(archive.read(t.mbox(name))) for name in boxes()}


def reference(t):
    """The archives of these mails, without compression."""
    with imapd.Server(boxes()) as server:
        dest, t.dest = t.dest, os.path.join(t.folder, 'reference')
        scripted(t, server, compress=False)
        t.backup()
        assert not server.faults, server.faults
        found = stored(t)
        t.dest = dest
        return found


def test_pieces_of_all_kinds(t):
    """Octet by octet; the first compressed octets together with the OK; other kinds of blocks."""
    want = reference(t)
    for i, more in enumerate(({}, {'segment': 1}, {'segment': 1, 'level': 1},
                              {'extra': '* OK hello\r\n' * 50}, {'level': 0}, {'level': 9},
                              {'strategy': zlib.Z_FIXED, 'segment': 3},
                              {'strategy': zlib.Z_HUFFMAN_ONLY})):
        with imapd.Server(boxes(), session=type('S', (Session,), more)) as server:
            t.dest = os.path.join(t.folder, 'backup%d' % i)
            scripted(t, server)
            t.backup()
            assert len(server.lines('COMPRESS')) == 1
            assert not server.faults, server.faults
            assert stored(t) == want, more


def test_a_server_that_will_not(t):
    """NO and BAD: the backup goes on without, and does not ask again."""
    want = reference(t)
    for i, answer in enumerate(('NO [COMPRESSIONACTIVE] TLS does it', 'NO no', 'BAD what?')):
        def start(self, tag):
            self.line('%s %s' % (tag, answer))

        with imapd.Server(boxes(), session=type('S', (Session,), {'start': start})) as server:
            t.dest = os.path.join(t.folder, 'backup%d' % i)
            scripted(t, server)
            t.backup()
            assert len(server.lines('COMPRESS')) == 1 and not server.faults
            assert stored(t) == want
    with imapd.Server(boxes(), session=type('S', (Session,), {'greeting': '* OK Microsoft Exchange\r\n'})) as server:
        t.dest = os.path.join(t.folder, 'backup-one')
        scripted(t, server)
        t.backup()
        assert not server.lines('COMPRESS') and not server.faults


def test_cut_in_the_middle(t):
    """The line breaks within the compressed stream: an error, and a later run completes the archive."""
    want = reference(t)
    for i, (octets, how) in enumerate(((700, 'rst'), (900, 'fin'), (5000, 'fin'), (20000, 'rst'), (40001, 'fin'))):
        t.dest = os.path.join(t.folder, 'backup%d' % i)
        with imapd.Server(boxes(), session=type('S', (Session,), {'cut': (octets, how)})) as server:
            scripted(t, server)
            got = t.backup(status=1)
            assert 'connection' in got.err, got.err
        with imapd.Server(boxes(), session=Session) as server:
            scripted(t, server)
            t.backup()
            assert stored(t) == want


def test_damaged_streams(t):
    """What does not inflate is an error of the connection, in words; nothing wrong is stored for good."""
    want = reference(t)

    def spoil(at, octets):
        def damage(self, data):
            begin, self.so_far = getattr(self, 'so_far', 0), getattr(self, 'so_far', 0) + len(data)
            return data if not begin <= at < begin + len(data) else \
                data[:at - begin] + octets + data[at - begin:]
        return damage

    for i, (damage, words) in enumerate((
            (lambda self, data: b'\x06' + data, 'no known type'),
            (lambda self, data: b'\x03\x00' + data, 'after its end'),
            (spoil(3000, b'\xff' * 30), r'compressed data is wrong|IMAP|server sent|connection|expected'))):
        t.dest = os.path.join(t.folder, 'backup%d' % i)
        with imapd.Server(boxes(), session=type('S', (Session,), {'damage': damage})) as server:
            scripted(t, server)
            got = t.backup(status=1) if i < 2 else t.run()   # there the damage may lie in a mail
            assert re.search(words, got.err) or got.status == 0 and i == 2, got.err
        with imapd.Server(boxes(), session=Session) as server:
            scripted(t, server)
            t.backup()
            # In the clear, damage may well pass for a mail; all the others must be right.
            assert sum(a != b for name in want for a, b in zip(stored(t)[name], want[name])) <= (i == 2)


def test_retried_after_damage(t):
    """The next connection of the same run is a fresh one, and compresses again."""
    want = reference(t)

    def damage(self, data):
        return data if self.number > 1 else b'\x07' + data

    with imapd.Server(boxes(), session=type('S', (Session,), {'damage': damage})) as server:
        scripted(t, server, retries=2)
        got = t.backup()
        assert 'no known type' in got.err, got.err
        assert len(server.lines('COMPRESS')) == 2 and not server.faults
        assert stored(t) == want


def test_a_slow_line(t):
    """COMPRESS goes out behind the mails that are on their way. No line here is slow: the limits are."""
    with open(os.path.join(TOP, 'imap_backup.c')) as f:
        source = f.read()
    for name, value in (('RATE', '1 << 30'), ('OCTETS', '10000'), ('CONNECT_MS', '0'), ('STARTS', '0')):
        source, n = re.subn(r'(\tCOMPRESS_%s = )[^,]*,' % name, r'\g<1>%s,' % value, source)
        assert n == 1, name
    program = os.path.join(t.folder, 'imap_backup')
    with open(program + '.c', 'w') as f:
        f.write(source)
    compile_c(program, program + '.c')
    server = t.dovecot('-compress', compress=True)
    held = fill(t, {'INBOX': few(100), 'A': few(100, 'a')}, server)
    t.config(t.account(server), email_batch_size=5, processes_per_account=1)
    done = subprocess.run([program, '-vv', t.path], stderr=subprocess.PIPE, timeout=60)
    text = done.stderr.decode(errors='replace')
    assert done.returncode == 0, text
    commands = re.findall(r'C: \S+ (COMPRESS|UID FETCH \S+ \(UID FLAGS INTERNALDATE)', text)
    assert commands.count('COMPRESS') == 1 and 0 < commands.index('COMPRESS') < 20, commands
    t.same(held)


def test_compress_in_the_config(t):
    """An account's own word counts more than the whole config's; true and false and nothing else."""
    with imapd.Server(boxes(), session=Session) as server:
        t.config(t.account(server, 'plain', ssl=False, host='127.0.0.1', compress=False), compress=True)
        t.backup()
        assert not server.lines('COMPRESS')
        t.config(t.account(server, 'plain', ssl=False, host='127.0.0.1', compress='yes'))
        got = t.backup(status=2)
        assert 'accounts[0].compress: found a string, expected true or false' in got.err, got.err
