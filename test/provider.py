"""An OAuth provider over https on this machine: device flow (RFC 8628), authorization code with PKCE
(RFC 7636), refresh with rotation, client credentials, and introspection (RFC 7662) for Dovecot.

    with Provider(certs.good) as provider:
        t.config(account, oauth2={'work': provider.entry()})
        provider.browser(address, 'ada')      what a person's browser does; where it ends up
        provider.approve(code, 'ada')         ... at the page for the codes of devices
        provider.fail('token', invalid_grant('AADSTS50173: ...'))

Each endpoint can be told to fail in any way, once or so many times; `requests` is what it was asked.
"""
import base64
import hashlib
import http.server
import json
import secrets
import ssl
import threading
import time
import urllib.parse

CLIENT = '0a1b2c3d-client'


def error(word, description='', status=400, **more):
    """An answer of RFC 6749 5.2."""
    return status, dict({'error': word}, **({'error_description': description} if description else {}), **more)


def microsoft(word, number, text='what Microsoft says'):
    return error(word, 'AADSTS%d: %s. Trace ID: 9a0d Correlation ID: 7f31 Timestamp: 2026-11-25 10:00:00Z'
                 % (number, text), error_codes=[number], trace_id='9a0d', correlation_id='7f31')


class Provider:
    """
    lifetime   of an access token, in seconds
    rotate     each refresh gives another refresh token; strict: and the old one is void
    secret     of the client; None: it is a public one, and must send none
    interval   seconds between two questions for a device
    expires    seconds that a device's code is good for
    """

    def __init__(self, certificate, lifetime=3600, rotate=True, strict=True, secret=None, interval=1, expires=600):
        self.lifetime, self.rotate, self.strict, self.secret = lifetime, rotate, strict, secret
        self.interval, self.expires, self.delay = interval, expires, 0
        self.lock = threading.Lock()
        self.requests = []   # (endpoint, {field: value})
        self.failures = {}   # {endpoint or grant: [answer]}
        self.codes, self.devices, self.refresh, self.access = {}, {}, {}, {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
                path, _, query = self.path.partition('?')
                form = dict(urllib.parse.parse_qsl(body or query, keep_blank_values=True))
                status, answer, *headers = outer.answer(path.strip('/').split('/')[-1], form)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header('Content-Type', 'application/json')
                    self.send_header('Content-Length', str(len(data)))
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass   # whoever asked does not want so much

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None   # a client that does not trust us says so
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True,
                                                 do_handshake_on_connect=False)
        self.url = 'https://localhost:%d' % self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    # -- what a test does --

    def entry(self, device=True, **more):
        """An entry of the config's "oauth2"."""
        return dict({'type': 'custom', 'client_id': CLIENT, 'auth_url': self.url + '/authorize',
                     'token_url': self.url + '/token', 'scope': 'mail offline_access',
                     'redirect': 'http://127.0.0.1/'},
                    **({'device_url': self.url + '/devicecode'} if device else {}),
                    **({'client_secret': self.secret} if self.secret else {}), **more)

    def fail(self, where, answer, times=1):
        """Give this answer, `times` in a row: (status, dict or octets[, (header, value) ...])."""
        self.failures.setdefault(where, []).extend([answer] * times)

    def grants(self, kind='refresh_token'):
        """How many tokens were asked for by this grant."""
        return sum(form.get('grant_type') == kind for _, form in self.requests)

    def browser(self, address, user, deny=False):
        """Sign in at the address; where the browser is sent to."""
        url, _, query = address.partition('?')
        asked = dict(urllib.parse.parse_qsl(query))
        assert url == self.url + '/authorize' and asked['client_id'] == CLIENT, address
        assert asked['response_type'] == 'code' and asked['code_challenge_method'] == 'S256', asked
        if deny:
            back = {'error': 'access_denied', 'error_description': 'The user said no.', 'state': asked['state']}
        else:
            code = '4/0A' + secrets.token_urlsafe(30)
            self.codes[code] = dict(asked, user=user)
            back = {'code': code, 'scope': asked['scope'], 'state': asked['state'], 'session_state': 'x'}
        return asked['redirect_uri'] + '?' + urllib.parse.urlencode(back) + '#'

    def approve(self, code, user, deny=False):
        """What a person does with a device's code."""
        device = next(d for d in self.devices.values() if d['user_code'] == code)
        device['user'], device['denied'] = user, deny

    def expire(self):
        """All access tokens are void from now on."""
        self.access = {token: (user, 0) for token, (user, _) in self.access.items()}

    # -- what a client asks --

    def answer(self, endpoint, form):
        with self.lock:
            self.requests.append((endpoint, form))
            for where in (form.get('grant_type', '').split(':')[-1], endpoint):
                if self.failures.get(where):
                    return self.failures[where].pop(0)
        if endpoint == 'introspect':
            return self.introspect(form)
        time.sleep(self.delay)
        with self.lock:
            if form.get('client_id') != CLIENT:
                return microsoft('unauthorized_client', 700016, 'no such application')
            return getattr(self, 'at_' + endpoint)(form)

    def introspect(self, form):
        user, until = self.access.get(form.get('token'), ('', 0))
        if until <= time.time():
            return 200, {'active': False}
        return 200, {'active': True, 'username': user, 'scope': 'mail', 'client_id': CLIENT, 'exp': int(until)}

    def at_devicecode(self, form):
        if form.get('client_secret') != self.secret:   # as Keycloak answers, which takes RFC 8628 3.1 at its word
            return error('unauthorized_client', 'Client secret not provided in request', 401)
        code, user_code = secrets.token_urlsafe(30), secrets.token_hex(4).upper()
        self.devices[code] = {'user_code': user_code, 'user': None, 'denied': False, 'last': 0,
                              'until': time.time() + self.expires}
        return 200, {'device_code': code, 'user_code': user_code, 'verification_uri': self.url + '/device',
                     'expires_in': self.expires, 'interval': self.interval, 'message': 'To sign in ...'}

    def at_token(self, form):
        grant = form.get('grant_type', '').split(':')[-1]
        if self.secret is None and 'client_secret' in form:
            return microsoft('invalid_client', 700025, 'Client is public so no client_secret should be presented')
        if self.secret is not None and form.get('client_secret') != self.secret:
            return microsoft('invalid_client', 7000218, 'The request body must contain client_assertion or client_secret')
        if grant == 'client_credentials':
            return 200, self.tokens(form.get('scope'), refresh=False)
        if grant == 'refresh_token':
            user = self.refresh.get(form.get('refresh_token'))
            if user is None:
                return microsoft('invalid_grant', 70000, 'The provided value for the refresh token is not valid')
            if self.rotate and self.strict:
                del self.refresh[form['refresh_token']]
            return 200, self.tokens(user, refresh=self.rotate)
        if grant == 'device_code':
            device = self.devices.get(form.get('device_code'))
            if device is None:
                return microsoft('bad_verification_code', 70018)
            early, device['last'] = time.time() - device['last'] < self.interval * 0.9, time.time()
            if device['until'] < time.time():
                return microsoft('expired_token', 70019)
            if device['denied']:
                return microsoft('authorization_declined', 65004, 'User declined to consent')
            if device['user'] is None:
                return error('slow_down' if early else 'authorization_pending')
            del self.devices[form['device_code']]
            return 200, self.tokens(device['user'])
        if grant == 'authorization_code':
            asked = self.codes.pop(form.get('code'), None)
            challenge = hashlib.sha256(form.get('code_verifier', '').encode()).digest()
            if asked is None or form.get('redirect_uri') != asked['redirect_uri']:
                return microsoft('invalid_grant', 70000, 'The provided authorization code is not valid')
            if base64.urlsafe_b64encode(challenge).decode().rstrip('=') != asked['code_challenge']:
                return error('invalid_grant', 'PKCE verification failed')
            return 200, self.tokens(asked['user'])
        return error('unsupported_grant_type')

    def tokens(self, user, refresh=True):
        access = 'at.' + secrets.token_urlsafe(600)
        self.access[access] = (user, time.time() + self.lifetime)
        answer = {'token_type': 'Bearer', 'scope': 'mail', 'expires_in': self.lifetime, 'access_token': access}
        if refresh:
            answer['refresh_token'] = 'rt.' + secrets.token_urlsafe(600)
            self.refresh[answer['refresh_token']] = user
        return answer
