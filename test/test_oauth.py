"""OAuth: signing in, the token file, refreshing, SASL; against a provider and a Dovecot of our own."""
import base64
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
import urllib.parse

import provider as providers
import sample
from imapd import Mailbox, Server, Session
from provider import CLIENT, Provider, error, microsoft
from run import PROGRAM, children, memory
from test_backup import few, fill
from test_wire import letters
from torture import held


def started(t, **options):
    p = Provider(t.certs.good, **options)
    t.cleanups.append(p.stop)
    return p


def with_dovecot(t, p, *mechanisms, **more):
    """A Dovecot that takes the provider's tokens, with some mail; writes the config."""
    server = t.dovecot(t.name, provider=(p.url + '/introspect', t.certs.ca, *mechanisms))
    have = fill(t, {'INBOX': few(5), 'Other': few(3, 'o')}, server)
    account = t.account(server, oauth2='work')
    del account['password']
    t.config(account, oauth2={'work': p.entry()}, ca_file=t.certs.ca, **more)
    return have


class SignIn:
    """imap_backup --authorize, and what it says meanwhile."""

    def __init__(self, t, *options, name='work'):
        self.process = subprocess.Popen([*t.program, '--authorize', name, *options, t.path], cwd=t.folder,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
        t.cleanups.append(self.process.kill)
        self.err = ''

    def says(self, pattern):
        """Read until it has said this; the match."""
        while True:
            m = re.search(pattern, self.err)
            if m:
                return m
            line = self.process.stderr.readline()
            assert line, 'it did not say %r:\n%s' % (pattern, self.err)
            self.err += line

    def code(self):
        return self.says(r'enter the code (\S+) there').group(1)

    def address(self):
        return self.says(r'(https://\S+/authorize\?\S+)\n').group(1)

    def ends(self, status=0, paste=None):
        out, err = self.process.communicate(paste, timeout=60)
        self.err += err
        assert self.process.returncode == status and out == '', 'status %d:\n%s' % (self.process.returncode, self.err)
        return self.err


def sign_in(t, p, user=None):
    got = SignIn(t)
    p.approve(got.code(), user or t.user)
    return got.ends()


def cache(t, name='oauth2_custom_work.json'):
    return os.path.join(t.folder, name)


def tokens(t, name='oauth2_custom_work.json'):
    """(the refresh entry, the access entry) of a file with one of each."""
    with open(cache(t, name)) as f:
        whole = json.load(f)
    refresh, access = (list(whole.get(kind, {}).values()) for kind in ('RefreshToken', 'AccessToken'))
    assert len(refresh) <= 1 and len(access) <= 1, whole
    return refresh[0] if refresh else None, access[0] if access else None


def age(t, left=200, name='oauth2_custom_work.json'):
    """As if the access token were good for so many seconds."""
    with open(cache(t, name)) as f:
        whole = json.load(f)
    for entry in whole['AccessToken'].values():
        entry['expires_on'] = str(int(time.time()) + left)
    with open(cache(t, name), 'w') as f:
        json.dump(whole, f)


def clean(t, text):
    """No token stands in what was printed."""
    for entry in tokens(t):
        if entry:
            assert entry['secret'] not in text and entry['secret'][:20] not in text, text
            assert base64.b64encode(entry['secret'][:30].encode()).decode()[4:36] not in text, text


def test_sign_in_on_another_device(t):
    """Device flow, a backup, a token that ends, one that the server refuses; nothing of it is printed."""
    p = started(t)
    have = with_dovecot(t, p)
    got = t.backup(status=1)
    assert 'nobody has signed in yet' in got.err and '--authorize work ' + t.path in got.err, got.err
    p.fail('token', (503, b'busy'))   # passes, as does a line that breaks
    said = SignIn(t)
    code = said.code()
    assert p.url + '/device' in said.err and 'within 10 minutes' in said.err, said.err
    p.approve(code, t.user)
    said = said.ends()
    assert 'signed in; the token is in ' + cache(t) in said, said
    assert stat.S_IMODE(os.stat(cache(t)).st_mode) == 0o600
    got = t.backup('-vv')
    t.same(have)
    assert 'AUTHENTICATE XOAUTH2 ***' in got.err, got.err
    clean(t, said + got.err)
    assert p.grants() == 0
    first = tokens(t)
    age(t)
    got = t.backup('-vv')
    second = tokens(t)
    assert p.grants() == 1 and first[0]['secret'] != second[0]['secret'] and first[1] != second[1]
    clean(t, got.err)
    assert {x: y for x, y in first[0].items() if x not in ('secret', 'last_modification_time')} == \
        {x: y for x, y in second[0].items() if x not in ('secret', 'last_modification_time')}
    p.expire()   # the server knows better than the file
    t.backup()
    assert p.grants() == 2
    p.lifetime = 0   # now it refuses the fresh one, too
    p.expire()
    got = t.backup(status=1)
    assert p.grants() == 3 and re.search(r'\(status \w+\)', got.err), got.err
    assert sorted(x for x in os.listdir(t.folder) if 'oauth2' in x) == \
        ['oauth2_custom_work.json', 'oauth2_custom_work.json.lock']


def test_declined_and_too_late(t):
    p = started(t)
    with_dovecot(t, p)
    said = SignIn(t)
    p.approve(said.code(), t.user, deny=True)
    assert 'authorization_declined: AADSTS65004: User declined' in said.ends(1), said.err
    p.expires = 2
    said = SignIn(t)
    said.code()
    assert re.search('too old|not entered in time', said.ends(1)) and 'paste' not in said.err, said.err
    p.expires = 600
    p.fail('device_code', error('slow_down'))
    said = SignIn(t)
    p.approve(said.code(), t.user)
    began = time.monotonic()
    said.ends()
    assert time.monotonic() - began > 6, 'slow_down was not obeyed'
    assert not p.failures['device_code']


def test_device_flow_refused(t):
    """Then there is the other way: at once, or after the person has entered the code."""
    p = started(t)
    have = with_dovecot(t, p)
    for where, answer in (('devicecode', microsoft('unauthorized_client', 70001)),
                          ('device_code', microsoft('invalid_client', 7000218, 'must contain client_secret')),
                          ('devicecode', error('invalid_scope', 'Invalid device flow scope'))):
        p.fail(where, answer)
        said = SignIn(t)
        address = said.address()
        assert 'warning: no sign-in by a code: the provider says ' + answer[1]['error'] in said.err, said.err
        said.ends(paste=p.browser(address, t.user) + '\n')
        p.fail(where, answer)   # and a no there
        assert 'says access_denied: no no' in SignIn(t).ends(status=1, paste='?error=access_denied&error_description=no+no\n')
    t.backup()
    t.same(have)


def test_paste(t):
    """All that a person may paste, and what is no code of this sign-in."""
    p = started(t)
    have = with_dovecot(t, p)
    quote = urllib.parse.quote

    def code(address):
        return urllib.parse.parse_qs(address.partition('?')[2].rstrip('#'))['code'][0]

    good = {
        'address': lambda a: a,
        'no line end': lambda a: a.rstrip('#'),
        'spaces': lambda a: '   ' + a + ' \r',
        'code': code,
        'code, quoted': lambda a: quote(code(a), safe=''),
        'fragment': lambda a: 'http://127.0.0.1/#' + a.partition('?')[2].rstrip('#'),
        'inside another': lambda a: 'https://copy.example/page?response=' + quote(a.partition('?')[2], safe='') +
                                    '&approvalCode=' + quote(code(a), safe=''),
        'decoded': lambda a: urllib.parse.unquote(a),
    }
    for name, change in good.items():
        said = SignIn(t, '--paste')
        address = said.address()
        said.ends(paste=change(p.browser(address, t.user)) + ('' if name == 'no line end' else '\n'))
    t.backup()
    t.same(have)
    asked = dict(urllib.parse.parse_qsl(address.partition('?')[2]))
    assert asked['scope'] == 'mail offline_access' and len(asked['code_challenge']) == 43, asked
    kept = tokens(t)
    bad = {
        'state': (lambda a: re.sub('state=[^&]*', 'state=other', a), 'of another sign-in'),
        'nothing': (lambda a: '', 'no code in what was pasted'),
        'an address': (lambda a: 'https://mail.example/inbox', 'no code in what was pasted'),
        'another code': (lambda a: 'abc', 'invalid_grant'),
    }
    for name, (change, words) in bad.items():
        said = SignIn(t, '--paste')
        said.ends(1, paste=change(p.browser(said.address(), t.user)) + '\n')
        assert words in said.err, name + ': ' + said.err
    said = SignIn(t, '--paste')
    said.ends(1, paste=p.browser(said.address(), t.user, deny=True) + '\n')
    assert 'access_denied: The user said no.' in said.err, said.err
    assert tokens(t) == kept, 'a sign-in that failed cost the token'


def test_a_sign_in_with_nobody_to_read_from(t):
    p = started(t)
    with_dovecot(t, p)
    folder = os.open(t.folder, os.O_RDONLY)   # ready to be read, and cannot be
    done = subprocess.run([*t.program, '--authorize', 'work', '--paste', t.path], stdin=folder, timeout=20,
                          stderr=subprocess.PIPE)
    os.close(folder)
    assert done.returncode == 1 and b'no code in what was pasted' in done.stderr, done.stderr


def test_a_signal_ends_a_sign_in(t):
    """Also where nothing else is to be said; only the lock is left."""
    p = started(t)
    with_dovecot(t, p)
    for options, pattern in ((('-q',), r'enter the code (\S+) there'), (('-q', '--paste'), 'press Enter')):
        said = SignIn(t, *options)
        said.says(pattern)
        said.process.send_signal(signal.SIGINT)
        assert 'stopped by a signal' in said.ends(1), said.err
    assert [x for x in os.listdir(t.folder) if 'oauth2' in x] == ['oauth2_custom_work.json.lock']


def test_oauthbearer(t):
    p = started(t)
    have = with_dovecot(t, p, 'oauthbearer')
    sign_in(t, p)
    got = t.backup('-vv')
    t.same(have)
    assert 'AUTHENTICATE OAUTHBEARER ***' in got.err, got.err
    p.lifetime = 0
    p.expire()
    got = t.backup(status=1)
    assert '(status invalid_token)' in got.err and p.grants() == 1, got.err


def test_eight_that_need_one_token(t):
    """One asks the provider, the others find its token in the file."""
    p = started(t)
    with_dovecot(t, p)
    sign_in(t, p)
    t.backup()
    for left in (200, -100):
        age(t, left)
        p.delay, before = 0.5, p.grants()
        runs = [subprocess.Popen([PROGRAM, '--check', t.path], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                 cwd=t.folder) for _ in range(8)]
        for run in runs:
            out, err = run.communicate(timeout=60)
            assert run.returncode == 0, err.decode()
        assert p.grants() - before == 1, p.requests
    # The same where the server refuses the token that all of them have.
    p.expire()
    before = p.grants()
    runs = [subprocess.Popen([PROGRAM, '--check', t.path], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=t.folder) for _ in range(8)]
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0, err.decode()
    assert p.grants() - before == 1, p.grants() - before


def test_tokens_that_live_for_seconds(t):
    """Several connections, each with a token that is over before the next one logs in; and a day later."""
    p = started(t, lifetime=2)
    have = with_dovecot(t, p, processes_per_account=4)
    sign_in(t, p)
    t.backup()
    t.same(have)
    before = p.grants()
    age(t, -86400)
    assert '2 without news' in t.backup().err
    assert before > 0 and p.grants() > before, (before, p.grants())


def original(refresh, client=CLIENT, when=1700000000):
    """What MSAL writes for the Python original."""
    home, host = 'a1.b2', 'login.microsoftonline.com'
    return {
        'AccessToken': {
            '%s-%s-accesstoken-%s-common-mail' % (home, host, client): {
                'credential_type': 'AccessToken', 'secret': 'stale', 'home_account_id': home, 'environment': host,
                'client_id': client, 'target': 'mail', 'realm': 'common', 'token_type': 'Bearer',
                'cached_at': str(when), 'expires_on': str(when + 3600), 'extended_expires_on': str(when + 3600)},
            'another app': {'credential_type': 'AccessToken', 'secret': 'theirs', 'client_id': 'other',
                            'expires_on': '99999999999'}},
        'Account': {home + '-' + host + '-common': {
            'home_account_id': home, 'environment': host, 'realm': 'common', 'username': 'ada@example.org',
            'authority_type': 'MSSTS', 'local_account_id': 'Zo\u00eb "\u4e2d\\\u0007'}},
        'IdToken': {'x': {'credential_type': 'IdToken', 'secret': 'id', 'list': [1, -2.5e3, True, None, [], {}, 'a']}},
        'RefreshToken': {
            'old': {'credential_type': 'RefreshToken', 'secret': 'dead', 'client_id': client, 'home_account_id': 'z',
                    'last_modification_time': str(when - 9)},
            'theirs': {'credential_type': 'RefreshToken', 'secret': 'theirs', 'client_id': 'other',
                       'last_modification_time': str(when + 99)},
            '%s-%s-refreshtoken-%s--mail' % (home, host, client): {
                'credential_type': 'RefreshToken', 'secret': refresh, 'home_account_id': home, 'environment': host,
                'client_id': client, 'target': 'mail', 'last_modification_time': str(when), 'family_id': '1'}},
        'AppMetadata': {'appmetadata-%s-%s' % (host, client): {'client_id': client, 'environment': host}},
    }


def test_the_originals_token_file(t):
    """It is continued: what we need is replaced, all else stays, so that the original can go on with it."""
    p = started(t)
    have = with_dovecot(t, p)
    config = json.load(open(t.path))
    config['oauth2'] = {'work': p.entry(type='o365', device=False)}
    config['oauth2_cache'] = os.path.join(t.folder, 'cache')
    json.dump(config, open(t.path, 'w'))
    name = os.path.join('cache', 'oauth2_o365_work.json')
    os.mkdir(os.path.join(t.folder, 'cache'))
    p.refresh['rt.first'] = t.user
    before = original('rt.first')
    with open(cache(t, name), 'w') as f:
        json.dump(before, f, indent=4)
    t.backup()
    t.same(have)
    after = json.load(open(cache(t, name)))
    assert p.requests[0][1]['refresh_token'] == 'rt.first'
    for kind in ('Account', 'IdToken', 'AppMetadata'):
        assert before[kind] == after[kind], after[kind]
    key = next(k for k in before['RefreshToken'] if 'refreshtoken' in k)
    assert set(before['RefreshToken']) == set(after['RefreshToken'])
    for k in before['RefreshToken']:
        old, new = before['RefreshToken'][k], after['RefreshToken'][k]
        if k == key:
            assert new['secret'] in p.refresh and int(new['last_modification_time']) > time.time() - 99
            old, new = ({x: y for x, y in entry.items() if x not in ('secret', 'last_modification_time', 'family_id')}
                        for entry in (old, new))
        assert old == new, (old, new)
    mine = list(after['AccessToken'].values())
    assert len(mine) == 1, mine
    # What MSAL looks for when it is asked for a token without a person.
    theirs = next(e for e in before['AccessToken'].values() if e['client_id'] == CLIENT)
    assert all(mine[0][x] == theirs[x] for x in ('home_account_id', 'environment', 'target')), mine
    assert time.time() + 3000 < int(mine[0]['expires_on']) < time.time() + 3700
    p.rotate = False   # no new refresh token: the old one stays
    age(t, name=name)
    t.backup()
    assert json.load(open(cache(t, name)))['RefreshToken'][key] == after['RefreshToken'][key]


def test_what_a_provider_refuses(t):
    """Its own words, what to do about them, the command to run; and the token stays."""
    p = started(t)
    with_dovecot(t, p, retries=0)
    sign_in(t, p)
    age(t)
    kept = open(cache(t)).read()
    for answer, *words in (
            (microsoft('invalid_grant', 65001, 'has not consented'), 'AADSTS65001: has not consented', 'administrator'),
            (microsoft('invalid_grant', 90094), 'administrator'), (microsoft('invalid_grant', 50105), 'assign'),
            (microsoft('interaction_required', 50076), 'second factor'), (microsoft('invalid_grant', 70043), 'sign-in'),
            (microsoft('invalid_grant', 700082), 'not used'), (microsoft('invalid_grant', 50173), 'password changed'),
            (microsoft('invalid_grant', 70000), 'tenant_id'), (microsoft('invalid_grant', 53003), '--paste'),
            (microsoft('invalid_grant', 530084), 'administrator'),
            (microsoft('invalid_client', 7000218), 'public client'), (microsoft('invalid_client', 700025), 'remove'),
            (microsoft('invalid_request', 50011), 'redirect'), (microsoft('unauthorized_client', 700016), 'client_id'),
            (microsoft('invalid_request', 50194), 'tenant_id'), (microsoft('invalid_scope', 70011), 'scope'),
            (microsoft('invalid_client', 7000222), 'expired'), (error('invalid_client'), 'client_secret'),
            (error('invalid_grant', 'Bad Request \033[31m\r\nmore'), 'invalid_grant: Bad Request \\x1b[31m;'),
            (error('invalid_grant', 'x' * 5000), 'x' * 100), (error('odd thing'), 'the provider says odd thing'),
            ((404, b'<html>'), 'HTTP status 404'), ((200, b'{}'), 'HTTP status 200'), ((200, b'no'), 'HTTP status 200'),
            ((302, b'', ('Location', p.url + '/token')), 'HTTP status 302'),
            ((200, b' ' * 70000), 'more than 65536 octets')):
        before = len(p.requests)
        p.fail('refresh_token', answer)
        got = t.backup(status=1)
        assert all(word in got.err for word in words), '%s\n%s' % (words, got.err)
        assert answer[0] != 400 or '; run: imap_backup --authorize work ' + t.path in got.err, got.err
        assert 'Trace ID' not in got.err and open(cache(t)).read() == kept, got.err
        assert len([1 for where, _ in p.requests[before:] if where == 'token']) == 1, got.err
    for answer in ((500, b'oops'), (429, b'', ('Retry-After', '1')), error('temporarily_unavailable', status=400),
                   microsoft('temporarily_unavailable', 90033, 'later')):
        p.fail('refresh_token', answer)
        got = t.backup(status=1)
        assert '--authorize' not in got.err and open(cache(t)).read() == kept, got.err
    p.stop()
    got = t.backup(status=1)
    assert 'localhost' in got.err and '--authorize' not in got.err and open(cache(t)).read() == kept, got.err


def test_secrets_that_a_provider_repeats(t):
    """They are not shown, in no case of letters, and also where the text ends in the middle of one."""
    p = started(t, secret='Secret-Of-The-App')
    with_dovecot(t, p, retries=0)
    sign_in(t, p)
    age(t)
    refresh = tokens(t)[0]['secret']
    for text in (refresh, 'is %s wrong?' % refresh, 'x' * 130 + refresh, refresh.upper(), 'not secret-of-the-app'):
        p.fail('refresh_token', microsoft('invalid_grant', 70000, text))
        got = t.backup('-vv', status=1)
        assert 'invalid_grant: AADSTS70000' in got.err and '***' in got.err, got.err
        for form in (refresh, refresh.upper(), 'secret-of-the-app'):
            assert form[:8] not in got.err, got.err
    said = SignIn(t, '--paste')
    address = p.browser(said.address(), t.user)
    code = re.search('code=([^&]*)', address).group(1)
    p.fail('authorization_code', error('invalid_grant', urllib.parse.unquote(code)))
    assert 'invalid_grant: ***' in said.ends(1, paste=address + '\n'), said.err


def test_odd_answers_that_will_do(t):
    """Numbers that are texts or none; no scope, no type."""
    p = started(t)
    with_dovecot(t, p, retries=0)
    p.fail('devicecode', (200, {'device_code': 'x', 'user_code': 'ABCD', 'verification_uri': p.url + '/device',
                                'interval': '1', 'expires_in': '600'}))
    p.fail('device_code', (200, p.tokens(t.user)))
    said = SignIn(t).ends()
    assert 'open %s/device on any device and enter the code ABCD there, within 10 minutes' % p.url in said, said
    for life, left in (('3600', 3600), (3599.5, 3599), ('x', 600), (10 ** 30, 600), (-5, 600), (None, 600)):
        age(t)
        answer = p.tokens(t.user)
        p.fail('refresh_token', (200, {'access_token': answer['access_token'], 'expires_in': life}))
        t.backup('--check')
        assert left - 9 < int(tokens(t)[1]['expires_on']) - time.time() <= left, (life, tokens(t))


def test_long_names_have_files_of_their_own(t):
    p = started(t)
    with_dovecot(t, p)
    config = json.load(open(t.path))
    config['oauth2'] = {'x' * 199 + i: p.entry() for i in '12'}
    config['accounts'][0]['oauth2'] = 'x' * 199 + '1'
    json.dump(config, open(t.path, 'w'))
    for name in config['oauth2']:
        said = SignIn(t, name=name)
        p.approve(said.code(), t.user)
        said.ends()
        assert os.path.exists(cache(t, 'oauth2_custom_%s.json' % name)), os.listdir(t.folder)


def test_what_passes_is_tried_again(t):
    p = started(t)
    have = with_dovecot(t, p, retries=3)
    sign_in(t, p)
    age(t)
    p.fail('refresh_token', (503, b'oops'))
    t.backup()
    t.same(have)
    assert p.grants() == 2


def test_a_token_file_that_cannot_be_written(t):
    """Then no token is asked for: it would be lost."""
    p = started(t)
    with_dovecot(t, p)
    sign_in(t, p)
    age(t)
    os.mkdir(cache(t) + '.new')
    got = t.backup(status=1)
    assert '.new: cannot write' in got.err and p.grants() == 0, got.err
    said = SignIn(t)
    assert '.new: cannot write' in said.ends(1)
    os.rmdir(cache(t) + '.new')
    t.backup()
    for text in ('{"AccessToken": ', '[]', ''):
        with open(cache(t), 'w') as f:
            f.write(text)
        got = t.backup(status=1)
        assert cache(t) in got.err or 'nobody has signed in' in got.err, got.err
        assert open(cache(t)).read() == text
    os.unlink(cache(t))
    os.mkfifo(cache(t))   # nobody ever writes to it
    assert 'nobody has signed in' in t.backup(status=1, timeout=20).err


def test_the_tokens_of_an_app(t):
    """client_credentials: nobody signs in, --authorize only tries it."""
    p = started(t, secret='s3cret-of-app')
    have = with_dovecot(t, p)
    sign_in(t, p)   # as a person, before
    p.requests.clear()
    config = json.load(open(t.path))
    config['oauth2'] = {'work': p.entry(grant='client_credentials', scope=t.user)}
    json.dump(config, open(t.path, 'w'))
    assert 'it works' in SignIn(t).ends()
    with open(cache(t)) as f:
        whole = json.load(f)
    del whole['RefreshToken']
    with open(cache(t), 'w') as f:
        json.dump(whole, f)
    t.backup()
    t.same(have)
    assert p.grants('client_credentials') == 1 and p.requests[0][1]['client_secret'] == 's3cret-of-app'
    age(t)
    got = t.backup('-vv')
    assert p.grants('client_credentials') == 2 and tokens(t)[0] is None and 's3cret' not in got.err
    config['oauth2']['work']['client_secret'] = 'wrong'
    json.dump(config, open(t.path, 'w'))
    assert '7000218' in SignIn(t).ends(1)


def test_a_provider_that_is_not_who_it_says(t):
    """Only https, and the certificate is judged as a mail server's is."""
    p = Provider(t.certs.make('other_ca'))
    t.cleanups.append(p.stop)
    with_dovecot(t, p)
    said = SignIn(t)
    said.ends(1)
    assert 'error: https://localhost' in said.err and 'open ' not in said.err and not p.requests, said.err
    config = json.load(open(t.path))
    config['oauth2']['work'].update(device_url='http://user:pw@localhost:9/secret?x')
    json.dump(config, open(t.path, 'w'))
    said = SignIn(t)
    said.ends(2)
    assert 'begins with https' in said.err and 'pw@' not in said.err and 'secret' not in said.err, said.err


class Picky(Session):
    """Refuses in some way."""
    says = '%s NO no'
    login = 'AUTH=PLAIN AUTH=LOGIN'

    def cmd_AUTHENTICATE(self, tag, args):
        self.server.tried = getattr(self.server, 'tried', []) + ['AUTHENTICATE']
        if 'SASL-IR' not in self.capabilities:
            self.line('+ ')
            self.flush()
            args += ' ' + self.take_line().strip().decode()
        self.no_thanks(tag, args)

    def no_thanks(self, tag, args):
        self.line(self.says % tag)

    def cmd_LOGIN(self, tag, args):
        self.server.tried = getattr(self.server, 'tried', []) + ['LOGIN']
        super().cmd_LOGIN(tag, args)


def test_plain_refused_then_login(t):
    """LOGIN is tried once where PLAIN may not be wanted, and never after a wrong password."""
    def run(says, status, tried, password='secret', more={}, words=''):
        session = type('Odd', (Picky,), dict({'says': says}, **more))
        with Server({'INBOX': Mailbox(letters(2))}, session=session, certificate=t.certs.good,
                    tls=True) as server:
            t.config(t.account(server, password=password))
            got = t.backup(status=status)
            assert getattr(server, 'tried', []) == tried and words in got.err, (says, server.tried, got.err)
        return got.err

    both = ['AUTHENTICATE', 'LOGIN']
    run('%s BAD what', 0, both)
    run('%s NO [CANNOT] not that one', 0, both)
    run('%s NO sorry', 0, both)
    run('%s NO sorry', 0, both, more={'capabilities': 'IMAP4rev1'})
    run('%s NO [AUTHENTICATIONFAILED] wrong', 1, both[:1], words='app password')
    run('%s NO [CONTACTADMIN] wrong', 1, both[:1])
    err = run('%s NO sorry', 1, both, password='wrong', words='app password')
    assert 'username' in err, err
    run('%s BAD what', 1, both[:1], more={'login': 'AUTH=PLAIN LOGINDISABLED'})

    def hang_up(self, tag, args):
        self.server.tried = self.server.tried + ['LOGIN']
        self.drop('close')
    run('%s NO sorry', 1, both, more={'cmd_LOGIN': hang_up}, words='sorry')


def test_a_server_that_echoes_the_login(t):
    """What it repeats of password and token is not shown, in any message and with -vv."""
    secret = 'Correct"Horse\\Battery'

    def echo(self, tag, args):
        code = args.split()[-1]
        self.line('* OK [ALERT] you sent ' + base64.b64decode(code).decode().replace('\0', ' '))
        self.line('* OK what is ' + code)
        self.line('* OK [%s] what is this' % secret.lower().replace('"', ''))
        self.line('* OK ' + 'x' * 180 + ' ' + secret)
        self.line('%s NO [AUTHENTICATIONFAILED] %s is wrong' % (tag, secret))

    def echo_login(self, tag, args):
        self.line(tag + ' BAD cannot parse LOGIN ' + args)

    for more in ({'no_thanks': echo}, {'login': '', 'cmd_LOGIN': echo_login}):
        with Server({}, session=type('Odd', (Picky,), more), certificate=t.certs.good, tls=True) as server:
            t.config(t.account(server, password=secret))
            got = t.backup('-vv', status=1)
            for form in (secret, sample.quoted(secret), secret[:8], base64.b64encode(secret.encode()).decode()[4:20],
                         base64.b64encode(('\0%s\0%s' % (t.user, secret)).encode()).decode()[:30]):
                assert form.lower() not in got.err.lower(), form + '\n' + got.err
            assert '***' in got.err, got.err


class Taking(Session):
    """Takes tokens, in the steps of RFC 4422 and with the error that wants an answer."""
    login = 'AUTH=PLAIN AUTH=OAUTHBEARER'

    def cmd_AUTHENTICATE(self, tag, args):
        words = args.split()
        if len(words) == 1:
            self.line('+ ')
            self.flush()
            words.append(self.take_line().strip().decode())
        text = base64.b64decode(words[1]).decode()
        self.server.seen = getattr(self.server, 'seen', []) + [(words[0], text)]
        token = re.search('\1auth=Bearer (.*)\1\1$', text).group(1)
        if self.server.provider.access.get(token, ('', 0))[1] < time.time():
            self.line('+ ' + base64.b64encode(b'{"status":"400","schemes":"Bearer","scope":"mail"}').decode())
            self.flush()
            self.server.seen.append(self.take_line())
            return self.no(tag, self.refusal)
        self.user, self.state = 'x', 'in'
        self.server.enter(self)
        self.ok(tag, '[CAPABILITY %s] welcome' % self.capabilities)

    refusal = '[AUTHENTICATIONFAILED] Invalid credentials'


def test_sasl_in_steps(t):
    """With and without SASL-IR, the frame of either mechanism, a token too long for one line."""
    p = started(t)
    for login, capabilities, name in (('AUTH=OAUTHBEARER', 'IMAP4rev1', 'OAUTHBEARER'),
                                      ('AUTH=OAUTHBEARER', 'IMAP4rev1 SASL-IR', 'OAUTHBEARER'),
                                      ('AUTH=XOAUTH2 AUTH=OAUTHBEARER', 'IMAP4rev1', 'XOAUTH2')):
        session = type('Odd', (Taking,), {'login': login, 'capabilities': capabilities})
        with Server({'INBOX': Mailbox(letters(2))}, session=session, certificate=t.certs.good,
                    tls=True) as server:
            server.provider = p
            account = t.account(server, oauth2='work', username='a=b,c@example.org')
            del account['password']
            t.config(account, oauth2={'work': p.entry()}, ca_file=t.certs.ca)
            if not os.path.exists(cache(t)):
                sign_in(t, p)
            age(t, -1)
            t.backup()
            token = tokens(t)[1]['secret']
            assert set(server.seen) == {(name, {
                'XOAUTH2': 'user=a=b,c@example.org\1auth=Bearer %s\1\1' % token,
                'OAUTHBEARER': 'n,a=a=3Db=2Cc@example.org,\1host=localhost\1port=%d\1auth=Bearer %s\1\1'
                % (server.port, token)}[name])}, [(len(a), b[:99], b[-99:]) for a, b in server.seen]
            p.expire()
            before, server.seen = p.grants(), []
            t.backup()
            assert server.seen[1] == (b'AQ==\r\n' if name == 'OAUTHBEARER' else b'\r\n') and p.grants() == before + 1
            p.expire()
            p.fail('refresh_token', microsoft('invalid_grant', 50173), 9)
            got = t.backup(status=1)
            assert 'AADSTS50173' in got.err, got.err
            p.failures.clear()
            assert not server.faults, server.faults


def test_a_challenge_that_echoes_the_token(t):
    p = started(t)

    def echo(self, tag, args):
        said = base64.b64decode(args.split()[-1]).decode()
        token = re.search('Bearer (.*)\1\1', said).group(1)
        text = {'status': {'token': token, 'login': args.split()[-1]}[self.server.what]}
        self.line('+ ' + base64.b64encode(json.dumps(text).encode()).decode())
        self.flush()
        self.take_line()
        self.no(tag, 'no ' + said.replace('\1', ' '))
    with Server({}, session=type('Odd', (Taking,), {'login': 'AUTH=XOAUTH2', 'cmd_AUTHENTICATE': echo}),
                certificate=t.certs.good, tls=True) as server:
        server.provider = p
        account = t.account(server, oauth2='work')
        del account['password']
        t.config(account, oauth2={'work': p.entry()}, ca_file=t.certs.ca)
        sign_in(t, p)
        for server.what in ('token', 'login'):
            got = t.backup('-vv', status=1)
            assert '(status ***' in got.err, got.err
            clean(t, got.err)


def test_a_session_whose_token_ends(t):
    """Exchange ends it in the middle, by BYE or in an answer; with a fresh token it goes on, and no retry counts."""
    p = started(t)
    ends = []

    def hook(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY.PEEK[]' in args and ends and ends.pop():
            p.expire()   # sooner than the file says
            if len(ends) > 3:
                session.bye('Session invalidated - AccessTokenExpired')
            return session.no(tag, 'Session invalidated - AccessTokenExpired')
    with Server({'INBOX': Mailbox(letters(30))}, session=Taking, hook=hook, certificate=t.certs.good,
                tls=True) as server:
        server.provider = p
        account = t.account(server, oauth2='work')
        del account['password']
        t.config(account, oauth2={'work': p.entry()}, ca_file=t.certs.ca, retries=0, email_batch_size=5)
        sign_in(t, p)
        ends[:] = [False, True, False, True, False, False, True, False]
        got = t.backup()
        assert p.grants() == 3 and not ends and not server.faults, got.err
        t.same({'INBOX': held(server.boxes['INBOX'])})
        server.boxes['INBOX'].add(b'Subject: more\r\n\r\n')
        ends[:] = [True] * 99   # one that always says so is given up
        got = t.backup(status=1)
        assert len(ends) > 90, got.err


def test_a_token_that_is_refused_again(t):
    """A token is refreshed once a run because the server refuses it, also with mails in between (DESIGN 10)."""
    p = started(t)
    ends = []

    def hook(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY.PEEK[]' in args and ends and ends.pop():
            p.expire()   # the file says that it is good
            session.bye('going down')
    with Server({'INBOX': Mailbox(letters(30))}, session=Taking, hook=hook, certificate=t.certs.good,
                tls=True) as server:
        server.provider = p
        account = t.account(server, oauth2='work')
        del account['password']
        t.config(account, oauth2={'work': p.entry()}, ca_file=t.certs.ca, retries=2, email_batch_size=5)
        sign_in(t, p)
        for times, status in (1, 0), (2, 1):
            ends[:] = [True, False] * times
            before = p.grants()
            shutil.rmtree(t.archive(), ignore_errors=True)
            got = t.backup(status=status)
            assert p.grants() == before + 1 and not server.faults, (times, got.err)


def test_no_token_stays_in_memory(t):
    """While a worker works, neither it nor the parent has a token in memory, in any form; nor the app's secret."""
    p = started(t, secret='Secret-Of-The-App')
    seen, done = [], []

    def hook(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY.PEEK[]' in args and not done:
            done.append(True)
            for pid in [process.pid, *children(process.pid)]:
                seen.append(memory(pid))
    with Server({'INBOX': Mailbox(letters(20))}, session=Taking, hook=hook, certificate=t.certs.good,
                tls=True) as server:
        server.provider = p
        account = t.account(server, oauth2='work')
        del account['password']
        t.config(account, oauth2={'work': p.entry()}, ca_file=t.certs.ca)
        sign_in(t, p)
        old = tokens(t)
        age(t)
        process = subprocess.Popen([*t.program, t.path], stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and p.grants() == 1 and len(seen) > 1, err
        for secret in ('Secret-Of-The-App', *(entry['secret'] for entry in (*old, *tokens(t)))):
            for form in (secret, urllib.parse.quote(secret),
                         *(base64.b64encode(secret[i:].encode()).decode() for i in range(3))):
                for i, memo in enumerate(seen):
                    assert form[4:-4][:36].encode() not in memo, (i, form[:40])
