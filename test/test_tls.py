"""Certificates, STARTTLS and the way to a server, good and bad: what is refused, and in which words.

A table: each entry is an account with a scripted server of its own, all of them in one run. Where the way
is not safe no password may have been sent.
"""
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time

import archive
from imapd import BARE, FULL, Mailbox, Server, Session
from run import PROGRAM, Skip
from test_wire import held, letters, run


class Way:
    """
    says     a pattern of what is printed for the account; with `fails` it gets nothing, else all
    kind     of certificate, None: no TLS
    tls      from the first byte
    account  more keys of it; None: without this key
    odd      what is odd about the session
    """

    def __init__(self, says='', fails=True, kind='good', tls=True, account=None, address='127.0.0.1', server=True,
                 **odd):
        self.says, self.fails, self.kind, self.tls = says, fails, kind, tls
        self.account, self.address, self.server, self.odd = account or {}, address, server, odd


def fine(**more):
    return Way(fails=False, **more)


def walk(t, ways, env=None, **more):
    servers, accounts, complaints = {}, [], []
    box = Mailbox(letters(3))
    for name, way in ways.items():
        account = {'email': name + '@x', 'host': 'localhost', 'username': 'u', 'password': 'secret',
                   'ca_file': t.certs.ca}
        if way.server:
            servers[name] = Server({'INBOX': box}, certificate=way.kind and t.certs.make(way.kind),
                                   tls=way.tls and way.kind is not None, session=way.odd, address=way.address)
            t.cleanups.append(servers[name].stop)
            account['port'] = servers[name].port
        if way.tls:
            account['ssl'] = True
        account.update(way.account)
        accounts.append({k: v for k, v in account.items() if v is not None})
    status, said, err = run(t, accounts, **dict({'retries': 0, 'timeout': 3}, **more))
    for name, way in ways.items():
        lines, path = '\n'.join(said[name + '@x']), os.path.join(t.dest, name + '@x', 'INBOX.mbox')
        found = [] if re.search(way.says, lines) else ['not said: ' + way.says]
        if ('FAILED' in lines) != way.fails:
            found.append('must fail' if way.fails else 'must not fail')
        if not way.fails:
            found += archive.compare(path, held(box)) if os.path.exists(path) else ['there is no archive']
        elif name in servers and servers[name].lines('AUTHENTICATE|LOGIN'):
            found.append('has sent the password')
        if re.search(r'error -?\d+', lines):
            found.append('numbers instead of words')
        found += servers[name].faults if name in servers else []
        if found:
            complaints.append('%s: %s\n  said: %s\n  heard: %s' % (
                name, '; '.join(found), lines, name in servers and servers[name].lines()))
    assert not complaints, '\n'.join(complaints)
    return servers


def records(record, pause=0):
    """Instead of a handshake: the same record for ever."""
    def start_tls(self):
        try:
            while True:
                self.raw.sendall(record * (1 if pause else 1000))
                time.sleep(pause)
        except OSError:
            self.drop('rst')
    return start_tls


def test_certificates(t):
    pin = t.certs.fingerprint
    crlf, cut, junk, empty = (os.path.join(t.folder, n) for n in ('crlf.pem', 'cut.pem', 'junk.pem', 'empty.pem'))
    with open(t.certs.ca) as f:
        text = f.read()
    for path, data in ((crlf, text.replace('\n', '\r\n')), (cut, text.rstrip('\n')), (empty, ''),
                       (junk, '-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n')):
        with open(path, 'w', newline='') as f:
            f.write(data)
    names = []

    def noting(self):
        context = Session.context(self)
        context.sni_callback = lambda sock, name, _: names.append(name)
        return context

    def only_tls13(self):
        context = Session.context(self)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    def lax(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers('ALL:@SECLEVEL=0')
        context.load_cert_chain(*self.server.certificate)
        return context

    def wants_one(self):
        context = Session.context(self)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def only_tls11(self):
        context = lax(self)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        return context
    nobody = r'signed by nobody whom the CA bundle knows \(imap_backup, test %s\); to trust it alone: "tls_fingerprint": "%s"'
    walk(t, {
        'good': fine(context=noting),
        'rsa': fine(kind='rsa'),
        'chain': fine(kind='chain'),
        'address': fine(kind='ip', account={'host': '127.0.0.1'}, context=noting),
        'address-too': fine(account={'host': '127.0.0.1'}),
        'case': fine(account={'host': 'LocalHost'}),
        'common': Way('is for another name, not for localhost', kind='common'),
        'twice': fine(kind='twice'),
        'jumbled': fine(kind='jumbled'),
        'server': fine(kind='server'),
        'client': Way('not meant for servers', kind='client'),
        'critical': Way('a restriction that cannot be judged', kind='critical'),
        'weak': Way('RSA key of less than 2048 bits', kind='weak', context=lax),
        'large': Way(r'more than 4096 bits\)(?!.*fingerprint)', kind='large'),
        'names': Way('certificate is none, or of more than 32 kB', kind='names'),
        'sha1': Way('a signature that is weak, or unknown', kind='sha1', context=lax),
        'ed25519': Way('no cipher in common .*Ed25519', kind='ed25519'),
        'own-leaf': fine(kind='self_signed', account={'ca_file': t.certs.make('self_signed')[0]}),
        'by-rsa': fine(kind='by_rsa', account={'ca_file': t.certs.authority('rsa_ca')}),
        'forged': Way('signed by nobody', kind='forged'),
        'forged-rsa': Way('signed by nobody', kind='forged_rsa', account={'ca_file': t.certs.authority('rsa_ca')}),
        'no-sign': Way("an issuer's certificate is no CA's", kind='no_sign'),
        'old-root': Way("an issuer's certificate expired on", kind='old_root',
                        account={'ca_file': t.certs.authority('old')}),
        'old-middle': Way("an issuer's certificate expired on", kind='old_middle'),
        'no-ca': Way("an issuer's certificate is no CA's", kind='no_ca'),
        'too-deep': Way("an issuer's certificate is no CA's, or not for this", kind='too_deep'),
        'expired': Way(r'localhost: the certificate expired on (20\d\d-\d\d-\d\d), and this device.s clock says (?!\1)20',
                       kind='expired'),
        'future': Way(r'not valid before 20\d\d-\d\d-\d\d, and this device.s clock says 20', kind='future'),
        'name': Way('the certificate is for other.example, not for localhost', kind='name'),
        'name-address': Way('the certificate is for .*other.example, not for 127.0.0.1', kind='name',
                            account={'host': '127.0.0.1'}),
        'wrong-address': Way(r'certificate is for .*not for localhost', kind='ip'),
        'wildcard': Way(r'the certificate is for \*.example.org, not for localhost', kind='wildcard'),
        'other-ca': Way(nobody % ('other, whose certificate the server does not send', pin('other_ca')),
                        kind='other_ca'),
        'self-signed': Way(nobody % ('self_signed', pin('self_signed')), kind='self_signed'),
        'missing': Way('signed by nobody', kind='missing'),
        'pinned': fine(kind='self_signed', account={'tls_fingerprint': pin('self_signed'), 'ca_file': None}),
        'pinned-colons': fine(kind='other_ca', account={'tls_fingerprint': [pin('good'), ':'.join(
            re.findall('..', pin('other_ca').upper()))]}),
        'pinned-expired': fine(kind='expired', account={'tls_fingerprint': pin('expired'), 'host': '127.0.0.1'}),
        'pinned-other': Way(r'SHA-256 is %s, which is not "tls_fingerprint"' % pin('good'), kind='good',
                            account={'tls_fingerprint': pin('rsa')}),
        'ca-crlf': fine(account={'ca_file': crlf}),
        'ca-cut': fine(account={'ca_file': cut}),
        'ca-absent': Way('cannot read the CA bundle: No such file', account={'ca_file': t.folder + '/none.pem'}),
        'ca-empty': Way('no certificate in it', account={'ca_file': empty}),
        'ca-junk': Way('no certificate in it', account={'ca_file': junk}),
        'only11': Way('may speak only TLS 1.0 or 1.1', context=only_tls11),
        'hello10': Way('speaks only TLS 1.0 or 1.1', start_tls=records(
            b'\x16\3\1\0\x2a\2\0\0\x26\3\1' + bytes(32) + b'\0\0\x2f\0', 1)),
        'only13': Way('speaks only TLS 1.3', context=only_tls13),
        'plain': Way('no TLS is spoken here .143 is the port', kind=None, one=lambda self: self.drop('silence')),
        'alert': Way("TLS failed: the server's alert 46", start_tls=records(b'\x15\3\3\0\2\2\x2e', 1)),
        'wants-one': Way('no cipher in common .*or want a certificate of ours', context=wants_one),
        'silent': Way('nothing for 3 seconds', start_tls=lambda self: self.drop('silence')),
        'alerts': Way('nothing for 3 seconds', start_tls=records(b'\x15\3\3\0\2\1\x5a')),
        'alerts-slow': Way('nothing for 3 seconds', start_tls=records(b'\x15\3\3\0\2\1\x5a', .7)),
        'records': Way('nothing for 3 seconds', start_tls=records(b'\x16\3\3\0\0')),
        'closes': Way('cut without a TLS close|connection lost: Connection reset',
                      start_tls=lambda self: self.drop('close')),
    })
    assert sorted(map(str, names)) == ['None', 'localhost'], names


def test_control_characters_in_a_certificate(t):
    """They reach no terminal."""
    server = Server({'INBOX': Mailbox(letters(1))}, certificate=t.certs.make('controls'), tls=True)
    t.cleanups.append(server.stop)
    t.config(dict(t.account(server), port=server.port))
    out = t.backup('--check').out
    assert 'certificate of imap_backup, a\\x1b[2Jb\\xe2\\x80\\xaec, issued by' in out, out
    assert not re.search('[\0-\x09\x0b-\x1f\x7f-\x9f\u202e]', out), repr(out)


def test_name_constraints(t):
    """What an issuer may certify, critical or not, in the chain or in the CA bundle."""
    root = {'ca_file': t.certs.authority('limited_root')}
    outside = 'may not certify this name .name constraints'
    walk(t, {
        'inside': fine(kind='inside'),
        'inside-ip': fine(kind='inside', account={'host': '127.0.0.1'}),
        'inside-root': fine(kind='inside_root', account=root),
        'outside-root': Way('imap_backup, test limited_root ' + outside, kind='outside_root', account=root),
        'outside-dns': Way('imap_backup, test corp_ca ' + outside, kind='outside_dns'),
        'outside-soft': Way(outside, kind='outside_soft'),
        'outside-ip': Way(outside, kind='outside_ip'),
        'excluded-dns': Way(outside, kind='excluded_dns'),
        'excluded-ip': Way(outside, kind='excluded_ip'),
        'directory': fine(kind='directory'),
        'outside-directory': Way(outside, kind='outside_directory'),
        'excluded-directory': Way('cannot be judged', kind='excluded_directory'),
        'email': Way('cannot be judged', kind='email'),
        'pinned': fine(kind='outside_dns', account={'tls_fingerprint': t.certs.fingerprint('outside_dns')}),
    })


def test_no_ca_bundle(t):
    """What the system has is named by SSL_CERT_FILE; where there is none only a fingerprint helps."""
    os.environ['SSL_CERT_FILE'] = t.certs.ca
    try:
        walk(t, {'system': fine(account={'ca_file': None})})
        os.environ['SSL_CERT_FILE'] = '/nonexistent/ca.pem'
        walk(t, {'none': Way('/nonexistent/ca.pem: cannot read the CA bundle', account={'ca_file': None}),
                 'none-starttls': Way('CA bundle', tls=False, account={'ca_file': None}),
                 'pinned': fine(account={'ca_file': None, 'tls_fingerprint': t.certs.fingerprint()})})
    finally:
        del os.environ['SSL_CERT_FILE']


def inject(self, tag, args):
    self.put(tag + ' OK begin\r\n* CAPABILITY IMAP4rev1 AUTH=PLAIN\r\n* PREAUTH in\r\n')
    self.flush()
    self.start_tls()


def inject_later(self, tag, args):
    self.ok(tag)
    self.flush()
    self.more(0.3)   # our hello
    self.put('A2 OK nothing to see here\r\n')
    self.flush()
    self.drop('fin')


class Forgetful:
    """Before TLS it promises what it has not got after it."""
    def known(self):
        return BARE + ' AUTH=PLAIN' if self.tls else FULL + ' STARTTLS LOGINDISABLED AUTH=PLAIN'
    capabilities = BARE
    greeting = '* OK [CAPABILITY %s STARTTLS LOGINDISABLED] ready\r\n' % FULL


def test_starttls(t):
    """127.0.0.2 is an address of this machine from which, for the program, nothing tells that it is one."""
    far = {'address': '127.0.0.2', 'kind': None, 'tls': False, 'account': {'host': '127.0.0.2'}}
    odd = {k: v for k, v in vars(Forgetful).items() if not k.startswith('__')}
    servers = walk(t, {
        'good': fine(tls=False),
        'off': fine(tls=False, account={'ssl': False}),
        'forgetful': fine(tls=False, **odd),
        'expired': Way('expired on', kind='expired', tls=False),
        'name': Way('is for other.example', kind='name', tls=False),
        'injected': Way('talked before the TLS handshake', tls=False, cmd_STARTTLS=inject),
        'injected-later': Way('does not speak TLS|TLS', tls=False, cmd_STARTTLS=inject_later),
        'refused': Way('STARTTLS: the server says NO not today', tls=False,
                       cmd_STARTTLS=lambda self, tag, args: self.no(tag, 'not today')),
        'none-here': fine(kind=None, tls=False, account={'host': '127.0.0.1'}),
        'none-there': Way('offers no STARTTLS; set "ssl": true for TLS on port 993, or "ssl": false to', **far),
        'none-there-off': fine(**dict(far, account={'host': '127.0.0.2', 'ssl': False},
                                      says='warning: .*the password goes over the line in the clear')),
        'preauth': Way('PREAUTH', **far, greeting='* PREAUTH [CAPABILITY IMAP4rev1] in\r\n', user='u'),
        'preauth-late': Way('offers no STARTTLS', **far,
                            cmd_CAPABILITY=lambda self, tag, args: self.put(
                                '* PREAUTH in\r\n* CAPABILITY IMAP4rev1\r\n%s OK\r\n' % tag)),
        'pinned': Way('nothing is sent in the clear', kind=None, tls=False,
                      account={'ssl': False, 'host': '127.0.0.1', 'tls_fingerprint': 'ab' * 32}),
        'pinned-preauth': Way('PREAUTH', kind=None, tls=False, greeting='* PREAUTH in\r\n', user='u',
                              account={'host': '127.0.0.1', 'tls_fingerprint': 'ab' * 32}),
        'pinned-starttls': fine(tls=False, account={'ssl': False, 'tls_fingerprint': t.certs.fingerprint()}),
        'no-name': Way('no.such.name.invalid: the name cannot be looked up', server=False,
                       account={'host': 'no.such.name.invalid'}),
        'preauth-tls': fine(greeting='* PREAUTH in\r\n', user='u'),
        'tls-on-plain': Way('nothing for 3 seconds', tls=True, account={'ssl': None}),
        'nothing-on-143': Way('127.0.0.9, port 143 .*"ssl": true uses port 993.*: Connection refused', tls=False,
                              server=False, account={'host': '127.0.0.9'}),
        'nothing-on-993': Way('127.0.0.9, port 993: Connection refused', server=False, account={'host': '127.0.0.9'}),
    })
    assert servers['forgetful'].lines('AUTHENTICATE PLAIN$')


def test_truncation_is_not_a_goodbye(t):
    """A line that is cut is told apart from one that the server closed."""
    def ends(how):
        def hook(self, tag, args):
            self.drop(how)
        return dict(cmd_LIST=hook)
    server = Server({'INBOX': Mailbox(letters(3))}, certificate=t.certs.good, tls=True)
    t.cleanups.append(server.stop)
    for how, text in (('fin', 'connection cut without a TLS close'), ('close', 'connection closed by the server')):
        server.session = type('Ends', (Session,), ends(how))
        account = t.account(email='a@x')
        account['port'] = server.port
        status, said, err = run(t, [account], retries=0)
        assert status == 1 and text in err, err


def test_data_that_never_cease(t):
    """A mail without end, as fast as the line, or an octet now and then: a signal, and the parent's death, end it."""
    for pause in (0, .1):
        for number, victim in ((signal.SIGTERM, 'stopped'), (signal.SIGKILL, '')):
            begun, over = threading.Event(), threading.Event()

            def fetch(self, args, pause=pause, begun=begun, over=over):
                try:
                    self.put('* 1 FETCH (UID 1 BODY[] {4000000000}\r\n')
                    self.flush()
                    while True:
                        self.raw.sendall(b'x\r\n' * (1 if pause else 10000))
                        begun.set()
                        time.sleep(pause)
                except OSError:
                    over.set()
                    self.drop('rst')
            server = Server({'INBOX': Mailbox(letters(1))}, session={'fetch': fetch})
            t.cleanups.append(server.stop)
            account = {'email': 'a@x', 'host': '127.0.0.1', 'port': server.port, 'ssl': False, 'password': 'secret'}
            t.config(account, retries=0)
            process = subprocess.Popen([PROGRAM, t.path], stderr=subprocess.PIPE)
            assert begun.wait(30)
            process.send_signal(number)
            assert over.wait(60), 'goes on after signal %d' % number
            err = process.communicate(timeout=30)[1].decode()
            assert victim in err, err
            server.stop()


def test_ipv6(t):
    try:
        socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError:
        raise Skip('no IPv6 on this machine')
    both = socket.AF_INET6 in [x[0] for x in socket.getaddrinfo('localhost', 1)]
    walk(t, {
        'literal': fine(address='::1', account={'host': '::1'}),
        'literal-name': Way('is for other.example, not for ::1', kind='name', address='::1', account={'host': '::1'}),
        'localhost': fine(address='::1' if both else '127.0.0.1'),   # tries the addresses in turn
    })
