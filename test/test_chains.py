"""Chains of certificates, good and bad: our verdict (t_tls judge) beside that of `openssl verify`.

Certificates are put together octet by octet, so that also such come about as no tool makes. What we take,
OpenSSL must take; what OpenSSL takes and we do not is in LESS, with the reason.
"""
import base64
import hashlib
import os
import random
import re
import subprocess
import time

from run import HERE
from test_compress import compile_c

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
     0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5)
DAY = 86400


def double_add(p, q):
    """On P-256; None is the point at infinity."""
    if p is None or q is None:
        return p or q
    if p[0] == q[0] and p != q:
        return None
    slope = (3 * p[0] * p[0] - 3) * pow(2 * p[1], -1, P) if p == q else (q[1] - p[1]) * pow(q[0] - p[0], -1, P)
    x = (slope * slope - p[0] - q[0]) % P
    return x, (slope * (p[0] - x) - p[1]) % P


def times_g(k):
    out, power = None, G
    for i in range(k.bit_length()):
        if k >> i & 1:
            out = double_add(out, power)
        power = double_add(power, power)
    return out


def tlv(tag, *parts):
    body = b''.join(parts)
    n = len(body)
    size = bytes([n]) if n < 128 else (lambda o: bytes([0x80 + len(o)]) + o)(n.to_bytes((n.bit_length() + 7) // 8, 'big'))
    return bytes([tag]) + size + body


def seq(*parts):
    return tlv(0x30, *parts)


def number(n):
    return tlv(2, n.to_bytes(n.bit_length() // 8 + 1, 'big'))


def oid(text):
    a, b, *more = map(int, text.split('.'))
    out = bytes([40 * a + b])
    for n in more:
        part = bytes([n & 127])
        while n > 127:
            n >>= 7
            part = bytes([n & 127 | 128]) + part
        out += part
    return tlv(6, out)


def name(*values):
    return seq(*(tlv(0x31, seq(oid('2.5.4.' + kind), tlv(0x0C, text.encode()))) for kind, text in values))


def ca_name(text):
    return name(('10', 'chains'), ('3', text))


def when(days):
    return tlv(0x17, time.strftime('%y%m%d%H%M%SZ', time.gmtime(time.time() + days * DAY)).encode())


def bits(n):
    return tlv(3, bytes([0, n]))


def extension(kind, value, critical=False):
    return seq(oid(kind if '.' in kind else '2.5.29.' + kind), tlv(1, b'\xff') if critical else b'', tlv(4, value))


def general(kind, value):
    tag = {'dns': 0x82, 'ip': 0x87, 'email': 0x81, 'uri': 0x86, 'dir': 0xA4}[kind]
    return tlv(tag, value.encode() if isinstance(value, str) else value)


def constraints(permitted=(), excluded=(), tail=b''):
    out = b''
    for tag, bases in ((0xA0, permitted), (0xA1, excluded)):
        if bases:
            out += tlv(tag, *(seq(general(*base), tail) for base in bases))
    return seq(out)


class Key:
    """Signs with the same nonce always: these keys are no secrets, and it costs one multiplication."""
    NONCE = 0x5DEECE66D1234567890ABCDEF
    R = times_g(NONCE)[0] % N

    def __init__(self, secret):
        self.secret = secret
        x, y = times_g(secret)
        self.public = seq(seq(oid('1.2.840.10045.2.1'), oid('1.2.840.10045.3.1.7')),
                          tlv(3, b'\0\4' + x.to_bytes(32, 'big') + y.to_bytes(32, 'big')))
        self.id = hashlib.sha1(self.public).digest()

    def sign(self, octets, how):
        z = int.from_bytes(hashlib.new(how, octets).digest()[:32], 'big')
        return seq(number(self.R), number(pow(self.NONCE, -1, N) * (z + self.R * self.secret) % N))


HASHES = {'sha1': '1.2.840.10045.4.1', 'sha224': '1.2.840.10045.4.3.1', 'sha256': '1.2.840.10045.4.3.2',
          'sha384': '1.2.840.10045.4.3.3', 'sha512': '1.2.840.10045.4.3.4'}
KEYS = [Key(random.Random(i).getrandbits(250)) for i in range(6)]
SERVER = seq(oid('1.3.6.1.5.5.7.3.1'))
CLIENT = seq(oid('1.3.6.1.5.5.7.3.2'))
SIGNS = bits(6)   # keyCertSign, cRLSign


class Cert:
    def __init__(self, subject, signer=None, key=0, names=None, ca=True, pathlen=None, usage=None, purposes=None,
                 limits=None, critical=True, begin=-3, end=300, version=3, how='sha256', outer=None, inner=None, more=(),
                 basic=None, tail=b'', behind=b'', issuer=None):
        self.subject, self.key = subject if isinstance(subject, bytes) else ca_name(subject), KEYS[key]
        signer = signer or self
        if basic is None:
            basic = seq(tlv(1, b'\xff') if ca else b'', pathlen if isinstance(pathlen, bytes) else
                        number(pathlen) if pathlen is not None else b'')
        out = [extension('19', basic, True)] if basic else []
        for kind, value, hard in (('15', usage, True), ('37', purposes, False), ('30', limits, critical)):
            if value is not None:
                out.append(extension(kind, value, hard))
        if names is not None:
            out.append(extension('17', seq(*(general(*n) for n in names))))
        out += [extension('14', tlv(4, self.key.id)), extension('35', seq(tlv(0x80, signer.key.id))), *more]
        algorithm = seq(oid(HASHES[how]))
        tbs = seq(tlv(0xA0, number(version - 1)) if version > 1 else b'', number(random.getrandbits(60)),
                  seq(oid(HASHES[inner])) if inner else algorithm,
                  issuer or signer.subject, seq(when(begin), when(end)), self.subject, self.key.public,
                  tlv(0xA3, seq(*out)) if version > 2 else b'', tail)
        self.der = seq(tbs, seq(oid(HASHES[outer])) if outer else algorithm,
                       tlv(3, b'\0', signer.key.sign(tbs, how)), behind)


def pem(*certs):
    return ''.join('-----BEGIN CERTIFICATE-----\n%s-----END CERTIFICATE-----\n' % base64.encodebytes(c.der).decode()
                   for c in certs)


HOST = 'mail.example.org'


def leaf(signer, names=(('dns', HOST),), **more):
    return Cert('leaf', signer, key=5, names=names, **dict({'ca': False}, **more))


def chain(host=HOST, leaf_is=None, middle_is=None, root_is=None, deep_is=None, names=(('dns', HOST),)):
    """Root, intermediate(s), leaf, each with these odd properties: (host, anchors, what is sent)."""
    root = Cert('root', **(root_is or {}))
    middle = Cert('middle', root, key=1, **(middle_is or {}))
    sent = [middle]
    if deep_is is not None:
        sent.insert(0, Cert(**dict({'subject': 'deep', 'signer': middle, 'key': 2}, **deep_is)))
    return host, [root], [leaf(sent[0], names, **(leaf_is or {})), *sent]


def everywhere(what, **odd):
    for place in 'leaf_is', 'middle_is', 'root_is':
        yield '%s %s' % (place[:-3], what), chain(**{place: odd})


def by_hand():
    """(what it is, case); a case is a host, anchors, and what is sent."""
    san = extension('17', seq(general('dns', HOST)))
    other = extension('17', seq(general('dns', 'other.example')))
    yield 'plain', chain()
    yield 'deep', chain(deep_is={})
    for place in everywhere('expired', begin=-30, end=-2):
        yield place
    for place in everywhere('of the future', begin=2):
        yield place
    for place in everywhere('with an unknown critical extension', more=[extension('1.2.3.4', seq(), True)]):
        yield place
    for place in everywhere('with an unknown extension', more=[extension('1.2.3.4', seq())]):
        yield place
    for place in everywhere('with policies', more=[
            extension('36', seq(tlv(0x80, b'\0')), True), extension('54', number(0), True),
            extension('32', seq(seq(oid('1.2.3'))), True)]):
        yield place
    for how in HASHES:
        for place in everywhere('signed with ' + how, how=how):
            yield place
    for place in everywhere('of another algorithm outside', outer='sha512'):
        yield place
    for place in everywhere('of a smaller algorithm outside', how='sha512', outer='sha256'):
        yield place
    for place in everywhere('of another algorithm inside', inner='sha512'):
        yield place
    for text, odd in (('of version 1', {'version': 1}), ('of version 2', {'version': 2}),
                      ('without basic constraints', {'basic': b''}), ('that is none', {'ca': False}),
                      ('without basic constraints that signs', {'basic': b'', 'usage': SIGNS}),
                      ('that may sign', {'usage': SIGNS}), ('that may not sign', {'usage': bits(0xA0)}),
                      ('for servers', {'purposes': SERVER}), ('for clients', {'purposes': CLIENT}),
                      ('for anything', {'purposes': seq(oid('2.5.29.37.0'))}),
                      ('with two basic constraints', {'more': [extension('19', seq(), True)]}),
                      ('with junk at the end', {'tail': number(1)}), ('with junk behind', {'behind': number(1)}),
                      ('of length -1', {'pathlen': b'\2\1\xff'}), ('of length 00 00', {'pathlen': b'\2\2\0\0'}),
                      ('of length 00 80', {'pathlen': b'\2\2\0\x80'})):
        yield 'root ' + text, chain(root_is=odd)
        yield 'middle ' + text, chain(middle_is=odd)
        yield 'leaf ' + text, chain(leaf_is=dict({'ca': True}, **odd))
    for usage in (0x80, 0x40, 0x20, 0x08, 0x04, 0x10, 0):
        yield 'leaf with usage %02x' % usage, chain(leaf_is={'usage': bits(usage)})
    for length in 0, 1:
        for deep in None, {}, {'subject': 'middle'}:
            yield 'length %d, %s' % (length, deep), chain(middle_is={'pathlen': length}, deep_is=deep)
            yield 'length %d of the root, %s' % (length, deep), chain(root_is={'pathlen': length}, deep_is=deep)
    for text, more in (('twice', [san]), ('of two kinds', [other])):
        yield 'names ' + text, chain(leaf_is={'more': more})
    yield 'names of two kinds, the other first', chain(names=(('dns', 'other.example'),), leaf_is={'more': [san]})
    for text in ('MAIL.example.ORG', '*.example.org', '*.org', '*', '*.', 'm*.example.org', '*.*.org', '*mail.example.org',
                 'mail.*.org', 'mail.example.org.', 'mail.example.org\0.evil.example', 'evil.example\0mail.example.org',
                 'example.org', '.example.org', 'a.mail.example.org', '*.mail.example.org', '', '127.0.0.1', 'xn--*.example.org',
                 '*.EXAMPLE.org'):
        yield 'name %r' % text, chain(names=(('dns', text),))
        yield 'name %r as the last' % text, chain(names=(('email', 'a@b.example'), ('dns', 'a.example'), ('dns', text)))
    yield 'names with junk behind', chain(names=None, middle_is={'limits': constraints([('dns', 'org')])},
                                          leaf_is={'more': [extension('17', seq(general('dns', HOST), b'\x82\x7f'))]})
    for host, names in (('127.0.0.1', [('ip', b'\x7f\0\0\1')]), ('127.0.0.1', [('dns', '127.0.0.1')]),
                        ('127.0.0.1', [('dns', '*.0.0.1')]), ('127.0.0.1', [('ip', b'127.0.0.1')]),
                        ('::1', [('ip', bytes(15) + b'\1')]), ('::1', [('ip', b'\0\0\0\1')]),
                        ('::127.0.0.1', [('ip', b'\x7f\0\0\1')]), ('127.0.0.1', [('ip', bytes(12) + b'\x7f\0\0\1')]),
                        ('127.0.0.1', [('ip', b'\x7f\0\0\1\0')]), ('localhost', [('dns', '*')]),
                        ('65.65.65.65', [('ip', b'aaaa')]), ('xn--bcher-kva.example.org', [('dns', '*.example.org')]),
                        ('example.org', [('dns', '*.org')]), ('a.b.example.org', [('dns', '*.example.org')]), ('a.b.example.org', [('dns', '*.b.example.org')])):
        yield '%s as %s' % (host, names), chain(host, names=names)
    ip, net = ('ip', b'\x7f\0\0\1'), ('ip', b'\x7f\0\0\0\xff\0\0\0')
    ours, theirs = ca_name('leaf'), name(('10', 'theirs'))
    for text, limits in (
            ('org', constraints([('dns', 'org')])), ('the domain', constraints([('dns', 'example.org')])),
            ('subdomains', constraints([('dns', '.example.org')])), ('the host', constraints([('dns', HOST)])),
            ('below the host', constraints([('dns', '.' + HOST)])), ('half a part', constraints([('dns', 'ample.org')])),
            ('letters', constraints([('dns', 'EXAMPLE.Org')])), ('another', constraints([('dns', 'example.com')])),
            ('two', constraints([('dns', 'example.com'), ('dns', 'example.org')])),
            ('all', constraints([('dns', '')])), ('not all', constraints((), [('dns', '')])),
            ('not the host', constraints([('dns', 'org')], [('dns', HOST)])),
            ('not below', constraints((), [('dns', '.' + HOST)])), ('not another', constraints((), [('dns', 'example.com')])),
            ('a net', constraints([net])), ('not a net', constraints((), [net])), ('a narrow net', constraints([('ip', b'\x7f\0\0\2' + b'\xff' * 4)])),
            ('a net of 6', constraints([('ip', bytes(32))])), ('not 6', constraints((), [('ip', bytes(32))])),
            ('a broken net', constraints([('ip', b'\x7f\0\0\0')])), ('not a broken net', constraints((), [('ip', b'\x7f\0\0\0\xff')])),
            ('the organisation', constraints([('dir', name(('10', 'chains')))])), ('the leaf', constraints([('dir', ours)])),
            ('theirs', constraints([('dir', theirs)])), ('not theirs', constraints((), [('dir', theirs)])),
            ('mail', constraints([('email', 'example.org')])), ('not mail', constraints((), [('email', 'example.org')])),
            ('a web', constraints([('uri', 'example.org')])), ('nothing', seq()),
            ('a minimum', constraints([('dns', 'org')], tail=tlv(0x80, b'\1'))), ('junk', seq(tlv(0xA2))),
            ('the technically constrained', constraints([('dns', 'example.org'), net, ('dir', name(('10', 'chains')))], [('ip', bytes(32))]))):
        for host, names in ((HOST, (('dns', HOST), ip)), ('127.0.0.1', (ip,)), (HOST, (('dns', '*.example.org'),)),
                            (HOST, (('dns', HOST), ('email', 'a@b.example'), ('dir', ours))),
                            (HOST, (('dns', HOST), ('dns', 'x.example.com')))):
            yield 'limits to %s, %s' % (text, names), chain(host, names=names, middle_is={'limits': limits})
        if text not in ('the domain', 'another', 'mail', 'the technically constrained'):
            continue
        yield 'soft limits to ' + text, chain(middle_is={'limits': limits, 'critical': False})
        yield 'limits of the root to ' + text, chain(root_is={'limits': limits})
        yield 'deep limits to ' + text, chain(middle_is={'limits': limits}, deep_is={})
        yield 'self-issued limits to ' + text, chain(middle_is={'limits': limits}, deep_is={'subject': 'middle'})
    host, anchors, sent = chain(deep_is={})
    yield 'in another order', (host, anchors, [sent[0], sent[2], sent[1]])
    yield 'each twice', (host, anchors, sent + sent)
    yield 'with the root', (host, anchors, sent + anchors)
    yield 'with foreign ones', (host, anchors, [sent[0], *chain()[2], *sent[1:]])
    yield 'with one missing', (host, anchors, [sent[0], sent[2]])
    yield 'leaf as anchor', (host, [sent[0]], sent[:1])
    yield 'middle as anchor', (host, [sent[1]], sent[:1])
    alone = Cert('alone', key=5, ca=False, names=[('dns', HOST)])
    yield 'self-signed, trusted', (host, [alone], [alone])
    yield 'self-signed, not trusted', (host, anchors, [alone])
    yield 'self-signed, of another name', ('other.example', [alone], [alone])
    yield 'signed by a leaf', (host, anchors, [leaf(sent[0]), *sent])
    yield 'signed by another key', (host, [Cert('root', key=3)], sent)
    yield 'signed by another of the name', (host, [Cert('root', key=3), *anchors], sent)
    yield 'of no name', chain(leaf_is={'issuer': name()})


# Where we differ on purpose: what the case is, what we say, and why.
DIFFERENT = [
    (r'^root .* algorithm (out|in)side', 'signed by nobody', 'it could have been made so only by hand'),
    (r'signed with sha(1|224)', 'weak, or unknown', 'as weak as SHA-1, or hardly known'),
    (r'basic constraints that signs', 'no CA.s', 'a CA says that it is one'),
    (r'length 00 80', 'not for this', 'a limit of 128 issuers is none'),
    (r'leaf of length (-1|00 00)', 'ok', 'it is not looked at'),
    (r'for anything', 'ok', 'anyExtendedKeyUsage, as browsers do'),
    (r"'(m\*|\*mail)", 'is for', 'a wildcard for a part of a part: RFC 6125 6.4.3 would have it go'),
    (r'limits', 'cannot be judged', 'directory names excluded, mail addresses and URIs: not for servers'),
    (r"limits.*'dir'", 'not certify', 'a directory name as subjectAltName'),
    (r"limits.*\*", 'not certify', 'the host itself may not be excluded, too'),
]


def our_verdicts(t, cases):
    """'ok' or what is wrong, of each."""
    path = os.path.join(t.folder, 't_tls')
    compile_c(path, os.path.join(HERE, 't_tls.c'), '-g', '-O1', '-fsanitize=address,undefined')
    lines = ''
    for i, (_, (host, anchors, sent)) in enumerate(cases):
        for what, certs in (('ca', anchors), ('leaf', sent[:1]), ('sent', sent)):
            with open('%s/%d.%s' % (t.folder, i, what), 'w') as f:
                f.write(pem(*certs))
        lines += '%s %s/%d.ca %s\n' % (host, t.folder, i, b''.join(c.der for c in sent).hex())
    ours = subprocess.run([path, 'judge'], input=lines.encode(), stdout=subprocess.PIPE, check=True).stdout.decode(
        errors='replace').splitlines()
    assert len(ours) == len(cases), ours[-1:]
    return ours


def their_verdicts(t, cases):
    theirs = []
    for i, (_, (host, _, _)) in enumerate(cases):
        said = subprocess.run(['openssl', 'verify', '-no-CApath', '-no-CAstore', '-partial_chain',
                               '-auth_level', '2', '-CAfile', '%d.ca' % i, '-untrusted', '%d.sent' % i,
                               '-purpose', 'sslserver',
                               '-verify_ip' if host[-1] in '0123456789' else '-verify_hostname', host,
                               '%d.leaf' % i], cwd=t.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        words = said.stdout.decode(errors='replace')
        theirs.append('ok' if said.returncode == 0 else ' '.join(re.findall('error.*', words)) or words)
    return theirs


def compare(t, cases):
    complaints, taken, used = [], 0, set()
    for (what, _), ours, theirs in zip(cases, our_verdicts(t, cases), their_verdicts(t, cases)):
        taken += ours == 'ok'
        if (ours == 'ok') != (theirs == 'ok'):
            why = {d for d in DIFFERENT if re.search(d[0], what) and re.search(d[1], ours)}
            used |= why
            if not why:
                complaints.append('%s: %s; OpenSSL: %s' % (what, ours, theirs))
    complaints += ['no longer different: %s: %s' % d[:2] for d in DIFFERENT if d not in used]
    assert not complaints, '\n'.join(complaints)
    assert taken > len(cases) / 10, 'only %d of %d are taken' % (taken, len(cases))


def test_chains_as_openssl_judges(t):
    compare(t, list(by_hand()))


def test_chains_with_many_ways(t):
    """Every way to an anchor is tried, but not for ever; t_tls says so if there were too many signatures."""
    host, anchors, sent = chain()
    elsewhere, loop = Cert('root', key=3), Cert('middle', Cert('middle', key=1), key=1)
    foreign = Cert('middle', elsewhere, key=1)
    expired = Cert('middle', anchors[0], key=1, begin=-30, end=-2)
    same = Cert('same', key=1)
    many = [Cert('same', same, key=1) for _ in range(60)]
    deep = [Cert('ca 0')]
    for i in range(1, 11):
        deep.append(Cert('ca %d' % i, deep[-1], key=i % 2))
    cases = [(what, (host, anchors, [sent[0], *certs, sent[1]]), 'ok') for what, certs in (
        ('first to an unknown root', [foreign]), ('first over one that expired', [expired]),
        ('in a circle', [loop]), ('in many', [foreign, expired, loop]))]
    cases += [
        ('a square of signatures', (host, anchors, [leaf(same), *many]), 'the certificate has more than 8 issuers'),
        ('deep', (host, deep[:1], [leaf(deep[8]), *deep[1:9]]), 'the certificate has more than 8 issuers'),
        ('less deep', (host, deep[:1], [leaf(deep[7]), *deep[1:8]]), 'ok'),
        ('cut', (host, anchors, [sent[0], *many, *many, sent[1]]), 'the certificate is signed by nobody'),
        ('nothing', (host, anchors, []), 'what the server sends as its certificate is none')]
    for (what, _, words), said in zip(cases, our_verdicts(t, [c[:2] for c in cases])):
        assert said.startswith(words), (what, said)
