"""What the program talks to in the tests: a private Dovecot, certificates, a web server.

Everything listens on 127.0.0.1 at free ports, lives in one folder, and ends with the process that
started it, however that one ends.
"""
import base64
import glob
import http.server
import os
import pwd
import grp
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time

PASSWORD = 'secret'   # of every user of our Dovecot; any user name will do
SBIN = os.environ.get('PATH', '') + ':/usr/sbin:/usr/local/sbin'


def tool(*command, **more):
    """Run a program that must succeed; its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    if done.returncode != 0:
        raise RuntimeError('%s: %s' % (' '.join(command), done.stdout.decode(errors='replace')))
    return done.stdout.decode(errors='replace')


def free_ports(n):
    socks = [socket.socket() for _ in range(n)]
    for s in socks:
        s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return ports


class Certificates:
    """A CA of our own, `ca`, and on demand certificates of every kind, good and bad, as
    (certificate file, key file)."""

    LOCAL = 'DNS:localhost,IP:127.0.0.1,IP:0:0:0:0:0:0:0:1'
    HERE = 'DNS:localhost,IP:127.0.0.1'
    KINDS = {   # subjectAltName, not before and not after in days from now, issuer, what else _issue() takes
        'good': (LOCAL, -2, 800, 'ca'),
        'rsa': (LOCAL, -2, 800, 'ca', {'key': 'rsa:2048'}),
        'weak': (LOCAL, -2, 800, 'ca', {'key': 'rsa:1024'}),
        'large': (LOCAL, -2, 800, 'ca', {'key': 'rsa:4160'}),
        'names': (LOCAL + ''.join(',DNS:host%05d.example.org' % i for i in range(2000)), -2, 800, 'ca'),
        'sha1': (LOCAL, -2, 800, 'ca', {'hash': 'sha1'}),
        'ed25519': (LOCAL, -2, 800, 'ca', {'key': 'ed25519'}),
        'expired': (LOCAL, -800, -2, 'ca'),
        'future': (LOCAL, 2, 800, 'ca'),
        'future_other': (LOCAL, 2, 800, 'other'),
        'name': ('DNS:other.example', -2, 800, 'ca'),
        'wildcard': ('DNS:*.example.org', -2, 800, 'ca'),
        'ip': ('IP:127.0.0.1', -2, 800, 'ca'),
        'common': ('', -2, 800, 'ca', {'common': 'localhost'}),
        'controls': (LOCAL, -2, 800, 'ca', {'common': 'a\033[2Jb\u202ec'}),
        'client': (LOCAL, -2, 800, 'ca', {'more': 'extendedKeyUsage=clientAuth'}),
        'server': (LOCAL, -2, 800, 'ca', {'more': 'extendedKeyUsage=clientAuth,serverAuth'}),
        'critical': (LOCAL, -2, 800, 'ca', {'more': '1.2.3.4=critical,ASN1:NULL'}),
        'other_ca': (LOCAL, -2, 800, 'other'),
        'self_signed': (LOCAL, -2, 800, None),
        'missing': (LOCAL, -2, 800, 'middle'),   # the intermediate is not sent along
        'chain': (LOCAL, -2, 800, 'middle', {'chain': ['middle']}),
        'twice': (LOCAL, -2, 800, 'middle', {'chain': ['twice', 'middle']}),
        'jumbled': (LOCAL, -2, 800, 'deep', {'chain': ['other', 'middle', 'good', 'deep', 'ca']}),
        'by_rsa': (LOCAL, -2, 800, 'rsa_ca'),
        'forged': (LOCAL, -2, 800, 'ca', {'forge': True}),
        'forged_rsa': (LOCAL, -2, 800, 'rsa_ca', {'forge': True}),
        'no_sign': (LOCAL, -2, 800, 'no_sign_ca', {'chain': ['no_sign_ca']}),
        'old_root': (LOCAL, -2, 800, 'old'),
        'old_middle': (LOCAL, -2, 800, 'stale', {'chain': ['stale']}),
        'no_ca': (LOCAL, -2, 800, 'good', {'chain': ['good']}),
        'too_deep': (LOCAL, -2, 800, 'below_short', {'chain': ['below_short', 'short']}),
        'inside': (HERE, -2, 800, 'inside_ca', {'chain': ['inside_ca']}),
        'inside_root': (HERE, -2, 800, 'limited_root'),
        'outside_root': ('DNS:localhost,DNS:other.example', -2, 800, 'limited_root'),
        'outside_dns': (HERE, -2, 800, 'corp_ca', {'chain': ['corp_ca']}),
        'outside_soft': (HERE, -2, 800, 'corp_soft_ca', {'chain': ['corp_soft_ca']}),
        'outside_ip': (LOCAL, -2, 800, 'inside_ca', {'chain': ['inside_ca']}),
        'excluded_dns': (HERE, -2, 800, 'not_local_ca', {'chain': ['not_local_ca']}),
        'excluded_ip': (HERE, -2, 800, 'not_net_ca', {'chain': ['not_net_ca']}),
        'directory': (HERE, -2, 800, 'directory_ca', {'chain': ['directory_ca']}),
        'outside_directory': (HERE, -2, 800, 'elsewhere_ca', {'chain': ['elsewhere_ca']}),
        'excluded_directory': (HERE, -2, 800, 'not_directory_ca', {'chain': ['not_directory_ca']}),
        'email': (HERE + ',email:a@b.example', -2, 800, 'email_ca', {'chain': ['email_ca']}),
    }
    NET = 'permitted;IP:127.0.0.0/255.0.0.0'
    AUTHORITIES = {   # not before, not after, issuer, extensions
        'ca': (-3, 1000, None, ''),
        'other': (-3, 1000, None, ''),
        'old': (-1000, -3, None, ''),
        'limited_root': (-3, 1000, None, 'nameConstraints=critical,permitted;DNS:localhost'),
        'rsa_ca': (-3, 1000, None, ''),
        'no_sign_ca': (-3, 1000, 'ca', 'keyUsage=critical,cRLSign'),
        'middle': (-3, 1000, 'ca', ''),
        'deep': (-3, 1000, 'middle', ''),
        'stale': (-1000, -3, 'ca', ''),
        'short': (-3, 1000, 'ca', 'PATHLEN:0'),
        'below_short': (-3, 1000, 'short', ''),
        'inside_ca': (-3, 1000, 'ca', 'nameConstraints=critical,permitted;DNS:LocalHost,' + NET),
        'corp_ca': (-3, 1000, 'ca', 'nameConstraints=critical,permitted;DNS:corp.example'),
        'corp_soft_ca': (-3, 1000, 'ca', 'nameConstraints=permitted;DNS:corp.example'),
        'not_local_ca': (-3, 1000, 'ca', 'nameConstraints=critical,excluded;DNS:localhost,' + NET),
        'not_net_ca': (-3, 1000, 'ca', 'nameConstraints=critical,excluded;IP:127.0.0.0/255.0.0.0'),
        'directory_ca': (-3, 1000, 'ca', 'nameConstraints=critical,permitted;dirName:ours'),
        'elsewhere_ca': (-3, 1000, 'ca', 'nameConstraints=critical,permitted;dirName:theirs'),
        'not_directory_ca': (-3, 1000, 'ca', 'nameConstraints=critical,excluded;dirName:theirs'),
        'email_ca': (-3, 1000, 'ca', 'nameConstraints=critical,permitted;email:b.example'),
    }

    def __init__(self, folder):
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        self.ca = self.authority('ca')
        self.good = self.make('good')

    def authority(self, name):
        """The file of a CA's certificate."""
        if not os.path.exists(self._path(name, 'crt')):
            begin, end, issuer, more = self.AUTHORITIES[name]
            path = more.replace('PATHLEN', ',pathlen') if more.startswith('PATHLEN') else ''
            if issuer is not None:
                self.authority(issuer)
            self._issue(name, issuer, None, begin, end, more='' if path else more, path=path,
                        key='rsa:2048' if name == 'rsa_ca' else 'ec')
        return self._path(name, 'crt')

    def make(self, kind):
        """(certificate, key); the certificate's file has what is sent along with it."""
        sent = self._path(kind, 'pem')
        if not os.path.exists(sent):
            names, begin, end, issuer, *more = self.KINDS[kind]
            more = dict(*more)
            chain, forge = more.pop('chain', ()), more.pop('forge', False)
            if issuer in self.AUTHORITIES:
                self.authority(issuer)
            self._issue(kind, issuer, names, begin, end, **more)
            if forge:   # something else than what was signed
                der = ssl.PEM_cert_to_DER_cert(open(self._path(kind, 'crt')).read())
                assert der.count(b'test ' + kind.encode()) == 1
                with open(self._path(kind, 'crt'), 'w') as f:
                    f.write(ssl.DER_cert_to_PEM_cert(der.replace(b'test ' + kind.encode(), b'tesT ' + kind.encode())))
            with open(sent, 'w') as f:
                for name in [kind, *chain]:
                    f.write(open(self.authority(name) if name in self.AUTHORITIES else self._path(name, 'crt')).read())
        return sent, self._path(kind, 'key')

    def fingerprint(self, kind='good'):
        text = tool('openssl', 'x509', '-in', self.make(kind)[0], '-noout', '-fingerprint', '-sha256')
        return text.strip().split('=')[1].replace(':', '').lower()

    def _path(self, name, what):
        return os.path.join(self.folder, '%s.%s' % (name, what))

    def _issue(self, name, issuer, names, begin, end, key='ec', hash='sha256', common=None, more='', path=''):
        """names None: a CA. issuer None: signed by itself."""
        cert, private, request, conf = (self._path(name, x) for x in ('crt', 'key', 'csr', 'cnf'))
        own = issuer is None
        for suffix in ('.db', '.db.attr', '.serial'):
            with open(self._path(name, 'ca') + suffix, 'w') as f:
                f.write('%016x\n' % int.from_bytes(os.urandom(7), 'big') if suffix == '.serial' else '')
        with open(conf, 'w') as f:
            f.write('[req]\ndistinguished_name=dn\n[dn]\n[ca]\ndefault_ca=it\n[it]\n'
                    'database=%s.db\nserial=%s.serial\nnew_certs_dir=%s\ndefault_md=%s\n'
                    'unique_subject=no\npolicy=any\nemail_in_dn=no\n[any]\norganizationName=optional\n'
                    'commonName=supplied\n[ours]\nO=imap_backup\n[theirs]\nO=theirs\n[ext]\n%s\n%s\n'
                    % (self._path(name, 'ca'), self._path(name, 'ca'), self.folder, hash,
                       'basicConstraints=critical,CA:true' + path if names is None else
                       'basicConstraints=critical,CA:false' + ('\nsubjectAltName=' + names if names else ''), more))
        kind = {'ec': ['ec', '-pkeyopt', 'ec_paramgen_curve:P-256']}.get(key, [key])
        tool('openssl', 'req', '-new', '-config', conf, '-newkey', *kind, '-nodes', '-keyout', private,
             '-out', request, '-utf8', '-subj', '/O=imap_backup/CN=' + (common or 'test ' + name))
        when = [time.strftime('%Y%m%d%H%M%SZ', time.gmtime(time.time() + 86400 * d)) for d in (begin, end)]
        signer = ['-selfsign', '-keyfile', private] if own else \
            ['-cert', self._path(issuer, 'crt'), '-keyfile', self._path(issuer, 'key')]
        tool('openssl', 'ca', '-batch', '-notext', '-config', conf, *signer, '-in', request,
             '-out', cert, '-startdate', when[0], '-enddate', when[1], '-extensions', 'ext')


class Private:
    """A server in a folder of its own; as root it runs as nobody, and what a test writes there for it belongs to
    `owner`."""

    def __init__(self, folder, *below):
        self.folder, self.log_path = folder, os.path.join(folder, 'log')
        self.owner = pwd.getpwnam('nobody') if os.getuid() == 0 else pwd.getpwuid(os.getuid())
        for name in ('', *below):
            self._mkdir(os.path.join(folder, name))

    def stop(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def own(self, path):
        """Give a tree that a test has written to the server's user."""
        if os.getuid() == 0:
            for base, folders, files in os.walk(path):
                for name in [base] + [os.path.join(base, x) for x in folders + files]:
                    os.chown(name, self.owner.pw_uid, self.owner.pw_gid)

    def log(self):
        try:
            with open(self.log_path, errors='replace') as f:
                return f.read()
        except OSError:   # it has said why it does not start
            with open(self.log_path + '.out', errors='replace') as f:
                return f.read()

    def _own(self, path):
        if os.getuid() == 0:
            os.chown(path, self.owner.pw_uid, self.owner.pw_gid)

    def _mkdir(self, path):
        os.makedirs(path, exist_ok=True)
        self._own(path)

    def _write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, 'w') as f:
            f.write(text)
        self._own(path)
        return path

    def _as_user(self):
        return dict(user=self.owner.pw_uid, group=self.owner.pw_gid, extra_groups=[]) if os.getuid() == 0 else {}

    def _launch(self, command, **env):
        """Does it answer at its port?"""
        # The shell outlives nobody: its standard input ends with us, and then it ends the server.
        script = ('out=$1; shift; "$@" </dev/null >>"$out" 2>&1 & d=$!\n'
                  'read -r x; kill $d 2>/dev/null\n'
                  'for i in 1 2 3 4 5 6 7 8 9 10; do kill -0 $d 2>/dev/null || exit 0; sleep 0.2; done\n'
                  'kill -9 $d')
        self.process = subprocess.Popen(['sh', '-c', script, 'sh', self.log_path + '.out', *command],
                                        stdin=subprocess.PIPE, cwd=self.folder, start_new_session=True,
                                        env={'PATH': SBIN, **env}, **self._as_user())
        for _ in range(100):
            try:
                with socket.create_connection(('127.0.0.1', self.port), 5) as s:
                    if s.recv(100).startswith(b'* OK'):
                        return True
            except OSError:
                pass
            time.sleep(0.05)
        self.stop()
        return False


class Dovecot(Private):
    """A private Dovecot: implicit TLS at port `tls`, clear with STARTTLS at port `port`.

    starttls=False    no TLS at all
    capability        replaces what CAPABILITY says
    limit             connections of one user at a time (mail_max_userip_connections)
    certificate       (file, key); `certificates` has made it
    compress          COMPRESS=DEFLATE is offered
    provider          (URL of its introspection, CA): tokens are taken too, by XOAUTH2 and OAUTHBEARER, or by
                      the mechanisms named third
    """
    prefix, delimiter = '', '/'

    def __init__(self, folder, certificate, starttls=True, capability='', limit=100, compress=False,
                 provider=None):
        super().__init__(folder, 'run', 'home', 'raw')
        self.group = grp.getgrgid(self.owner.pw_gid).gr_name
        for source, name in zip(certificate, ('server.crt', 'server.key')):
            shutil.copy(source, os.path.join(folder, name))
            self._own(os.path.join(folder, name))
        self.version = tool('dovecot', '--version', env={'PATH': SBIN}).split()[0]
        for attempt in range(5):   # another process may take the port in between
            self.port, self.tls = free_ports(2)
            self.conf = self._write('dovecot.conf', self._config(starttls, capability, limit, compress,
                                                                 provider))
            if self._start():
                return
        raise RuntimeError('Dovecot does not start:\n' + self.log())

    # -- people --

    def home(self, user):
        return os.path.join(self.folder, 'home', user)

    def maildir(self, user, mailbox='INBOX'):
        base = os.path.join(self.home(user), 'Maildir')
        return base if mailbox == 'INBOX' else os.path.join(base, mailbox)

    def trace(self, user):
        """From now on keep what this user's clients send."""
        self._mkdir(os.path.join(self.folder, 'raw', user))

    def commands(self, user):
        """What they have sent after the login since trace(), and forget it: a list of lines."""
        lines = []
        for path in glob.glob(os.path.join(self.folder, 'raw', user, '*.in')):
            with open(path, 'rb') as f:
                lines += [line.rstrip(b'\r\n').split(b' ', 2) for line in f]   # time, tag, command
            os.unlink(path)
        return [line[-1].decode(errors='replace') for line in sorted(lines, key=lambda x: float(x[0]))]

    def new_uidvalidity(self, user, mailbox='INBOX'):
        """As if the mailbox had been restored: other UIDs, another UIDVALIDITY, the same mails."""
        path = self.maildir(user, mailbox)
        with open(os.path.join(path, 'dovecot-uidlist')) as f:
            old = int(re.search(r' V(\d+)', f.readline()).group(1))
        time.sleep(max(0, old + 1.1 - time.time()))   # the new one is made of the time in seconds
        for name in glob.glob(os.path.join(path, 'dovecot[.-]*')):
            if not name.endswith('keywords'):
                os.unlink(name)
        for name in glob.glob(os.path.join(self.maildir(user), 'dovecot-uidvalidity*')):
            os.unlink(name)

    def sessions(self, user):
        """(begin, end) of each of the user's sessions, from the log, in seconds."""
        begun, over = {}, []
        for line in self.log().splitlines():
            m = re.match(r'(\d+\.\d+) ', line)
            if not m or '<%s>' % user not in line and '(%s)' % user not in line:
                continue
            pid = re.search(r'mpid=(\d+)', line) or re.search(r'\)<(\d+)><', line)
            if re.search(' Login: | Logged in: ', line) and pid:
                begun[pid.group(1)] = float(m.group(1))
            elif pid and pid.group(1) in begun and re.search(r'Logged out|Disconnected|Connection closed', line):
                over.append((begun.pop(pid.group(1)), float(m.group(1))))
        return over + [(t, float('inf')) for t in begun.values()]

    def peak(self, user, slack=0.02):
        """Most sessions at a time; one that ends within `slack` of another's begin does not count."""
        spans = self.sessions(user)
        return max([sum(1 for b, e in spans if b <= begin < e - slack) for begin, _ in spans], default=0)

    # -- the rest --

    def _start(self):
        return self._launch(['dovecot', '-F', '-c', self.conf], HOME=self.folder)

    def _tokens(self, new, url, ca, mechanisms='xoauth2 oauthbearer'):
        """The lines for OAuth; they stand before the other passdb."""
        if new:
            return mechanisms, ['oauth2 {\n  introspection_mode = post\n  introspection_url = %s\n'
                                '  username_attribute = username\n  active_attribute = active\n'
                                '  active_value = true\n  ssl_client_ca_file = %s\n}' % (url, ca),
                                'passdb oauth2 {\n  mechanisms_filter = %s\n}' % mechanisms]
        with open(os.path.join(self.folder, 'oauth2.conf'), 'w') as f:
            f.write('introspection_mode = post\nintrospection_url = %s\nusername_attribute = username\n'
                    'active_attribute = active\nactive_value = true\ntls_ca_cert_file = %s\n' % (url, ca))
        self._own(f.name)
        return mechanisms, ['passdb {\n  driver = oauth2\n  mechanisms = %s\n  args = %s\n}' % (mechanisms, f.name)]

    def _config(self, starttls, capability, limit, compress, provider):
        new = tuple(int(x) for x in re.findall(r'\d+', self.version)[:2]) >= (2, 4)
        at, count = self.folder, 'restart_request_count' if new else 'service_count'
        lines = ['dovecot_config_version = 2.4.0', 'dovecot_storage_version = 2.4.0'] if new else []
        mechanisms, tokens = self._tokens(new, *provider) if provider else ('', [])
        lines += [
            'base_dir = %s/run' % at, 'state_dir = %s/run' % at, 'log_path = ' + self.log_path,
            'log_timestamp = "%s.%{usecs} "', 'listen = 127.0.0.1', 'protocols = imap',
            'default_internal_user = ' + self.owner.pw_name, 'default_login_user = ' + self.owner.pw_name,
            'default_internal_group = ' + self.group,
            'mail_max_userip_connections = %d' % limit, 'mail_fsync = never',
            'auth_failure_delay = 0', 'auth_mechanisms = plain login ' + mechanisms,
            'first_valid_uid = 1', 'first_valid_gid = 1',
            'rawlog_dir = %s/raw/%s' % (at, '%{user}' if new else '%u'),
            'ssl = ' + ('yes' if starttls else 'no'),
        ]
        lines += tokens
        if capability:
            lines.append('imap_capability = ' + capability)
        if new:
            lines += ['auth_allow_cleartext = yes', 'mail_driver = maildir', 'mail_path = ~/Maildir',
                      'mailbox_list_layout = fs', 'mail_inbox_path = ~/Maildir',
                      'ssl_server_cert_file = %s/server.crt' % at,
                      'ssl_server_key_file = %s/server.key' % at,
                      'passdb static {\n  password = %s\n}' % PASSWORD,
                      'userdb static {\n  fields {\n    uid = %d\n    gid = %d\n    home = %s/home/%%{user}\n  }\n}'
                      % (self.owner.pw_uid, self.owner.pw_gid, at)]
        else:
            lines += ['disable_plaintext_auth = no', 'mail_location = maildir:~/Maildir:LAYOUT=fs',
                      'ssl_cert = <%s/server.crt' % at, 'ssl_key = <%s/server.key' % at,
                      'stats_writer_socket_path =',
                      'protocol imap {\n  mail_plugins =%s\n}' % (' zlib imap_zlib' if compress else ''),
                      'passdb {\n  driver = static\n  args = password=%s\n}' % PASSWORD,
                      'userdb {\n  driver = static\n  args = uid=%d gid=%d home=%s/home/%%u\n}'
                      % (self.owner.pw_uid, self.owner.pw_gid, at)]
        lines += [
            'namespace inbox {\n  inbox = yes\n  separator = /\n}',
            'service imap-login {\n  chroot =\n  %s = %s\n  client_limit = 500\n'
            '  inet_listener imap {\n    port = %d\n  }\n  inet_listener imaps {\n    port = %d\n    ssl = yes\n  }\n}'
            % (count, 'unlimited' if new else 0, self.port, self.tls if starttls else 0),
            'service imap {\n  process_limit = 300\n  %s = 100\n}' % count,
            'service anvil {\n  chroot =\n}', 'service stats {\n  chroot =\n}',
        ]
        return '\n'.join(lines) + '\n'


# ---- servers that setup.sh has unpacked, not installed: they and Dovecot exclude each other ----

UNPACKED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'build', 'servers')


def unpacked(name, path):
    """What is there of a server, or None."""
    found = glob.glob(os.path.join(UNPACKED, name, path))
    return found[0] if found else None


def readable(name, folder):
    """Where nobody can run what is unpacked: there, or in a copy where that lies in a private folder."""
    at, parent = os.path.join(UNPACKED, name), UNPACKED
    while parent != '/':
        if os.getuid() == 0 and not os.stat(parent).st_mode & 1:
            return shutil.copytree(at, os.path.join(folder, 'unpacked'), symlinks=True)
        parent = os.path.dirname(parent)
    return at


def libraries(at):
    return ':'.join(sorted({os.path.dirname(path) for path in glob.glob(
        os.path.join(at, '**', 'lib*.so*'), recursive=True)}))


class Cyrus(Private):
    """In the clear at port `port`. Passwords are judged by a saslauthd of ours."""
    prefix, delimiter = '', '/'

    def __init__(self, folder):
        super().__init__(folder, 'lib', 'spool', 'lib/socket', 'lib/proc', 'lib/lock', 'lib/db', 'lib/log', 'lib/msg')
        self.mux = socket.socket(socket.AF_UNIX)
        self.mux.bind(os.path.join(folder, 'mux'))
        os.chmod(os.path.join(folder, 'mux'), 0o777)
        self.mux.listen(50)
        threading.Thread(target=self._judge, daemon=True).start()
        at = readable('cyrus', folder)
        programs = at + '/usr/lib/cyrus/bin'
        conf = self._write('imapd.conf', 'configdirectory: {0}/lib\ndefaultpartition: default\n'
                           'partition-default: {0}/spool\nadmins: admin\nallowplaintext: yes\ncyrus_user: {1}\n'
                           'sasl_pwcheck_method: saslauthd\nsasl_saslauthd_path: {0}/mux\nsasl_mech_list: PLAIN\n'
                           'autocreate_users: anyone\nautocreate_quota: 0\nautocreate_post: yes\nunixhierarchysep: yes\n'
                           'altnamespace: yes\nvirtdomains: off\nconversations: no\nmaxlogins_per_user: 0\n'
                           .format(folder, self.owner.pw_name))
        env = {'LD_LIBRARY_PATH': libraries(at), 'CYRUS_USER': self.owner.pw_name, 'SASL_PATH': ':'.join(
            glob.glob(at + '/usr/lib/*/sasl2') + glob.glob('/usr/lib/*/sasl2'))}
        for attempt in range(5):
            self.port, = free_ports(1)
            services = self._write('cyrus.conf', 'START {{\n  recover cmd="{0}/ctl_cyrusdb -C {1} -r"\n}}\nSERVICES {{\n'
                                   '  imap cmd="{0}/imapd -C {1} -U 30" listen="127.0.0.1:{2}" proto="tcp4" prefork=0\n'
                                   '}}\nEVENTS {{\n}}\n'.format(programs, conf, self.port))
            if self._launch([programs + '/master', '-C', conf, '-M', services, '-p', folder + '/pid', '-D'], **env):
                return
        raise RuntimeError('Cyrus does not start:\n' + self.log())

    def _judge(self):
        """saslauthd's protocol: four strings in, one out, each after its length; the second is the password."""
        while True:
            try:
                with self.mux.accept()[0] as s, s.makefile('rb') as f:
                    said = [f.read(int.from_bytes(f.read(2), 'big')).decode() for _ in range(4)]
                    answer = b'OK' if said[1] == PASSWORD else b'NO'
                    s.sendall(len(answer).to_bytes(2, 'big') + answer)
            except OSError:
                return


class Courier(Private):
    """Its imapd behind a login of ours, which stands for couriertcpd, imaplogin and authdaemond."""
    prefix, delimiter = 'INBOX.', '.'
    CAPABILITY = 'IMAP4rev1 UIDPLUS CHILDREN NAMESPACE THREAD=ORDEREDSUBJECT THREAD=REFERENCES SORT QUOTA IDLE'

    def __init__(self, folder):
        super().__init__(folder, 'home')
        at = readable('courier', folder)
        self.imapd, self.libraries = at + '/usr/bin/imapd', libraries(at)
        # What tells it of changes is asked for at each keyword, and waited for, while no such service runs.
        source = self._write('fam.c', ''.join('int FAM%s(void);\nint FAM%s(void) { return -1; }\n' % (name, name) for name in (
            'Open', 'Open2', 'Close', 'MonitorDirectory', 'CancelMonitor', 'NextEvent', 'Pending')))
        tool(*os.environ.get('CC', 'cc').split(), '-shared', '-fPIC', '-o', os.path.join(folder, 'fam.so'), source)
        self.listener = socket.create_server(('127.0.0.1', 0), backlog=50)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self):
        while True:
            try:
                s = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._login, args=(s,), daemon=True).start()

    def _login(self, s):
        with s:
            s.sendall(b'* OK [CAPABILITY %s AUTH=PLAIN] Courier-IMAP ready.\r\n' % self.CAPABILITY.encode())
            while True:
                line = b''
                while not line.endswith(b'\n'):   # what comes behind it is for imapd
                    c = s.recv(1)
                    if not c:
                        return
                    line += c
                words = line.decode().split()
                words += [''] * (4 - len(words))
                user = password = None
                if words[1].upper() == 'CAPABILITY':
                    s.sendall(b'* CAPABILITY %s AUTH=PLAIN\r\n%s OK done\r\n' % (self.CAPABILITY.encode(), words[0].encode()))
                elif words[1].upper() == 'LOGIN':
                    user, password = (w.strip('"') for w in words[2:4])
                elif words[1].upper() == 'AUTHENTICATE':
                    code = words[3]
                    if not code:
                        s.sendall(b'+ \r\n')
                        while not code.endswith('\n'):
                            code += s.recv(1).decode()
                    user, password = base64.b64decode(code).decode().split('\0')[1:]
                else:
                    s.sendall(words[0].encode() + b' NO not logged in\r\n')
                if user and password == PASSWORD:
                    break
                if user:
                    s.sendall(words[0].encode() + b' NO Login failed.\r\n')
            home = os.path.join(self.folder, 'home', user)
            for name in ('', 'Maildir', 'Maildir/cur', 'Maildir/new', 'Maildir/tmp'):
                self._mkdir(os.path.join(home, name))
            subprocess.run([self.imapd, 'Maildir'], stdin=s, stdout=s, stderr=subprocess.DEVNULL, cwd=home, env={
                'LD_LIBRARY_PATH': self.libraries, 'LD_PRELOAD': os.path.join(self.folder, 'fam.so'), 'HOME': home, 'AUTHENTICATED': user, 'AUTHADDR': user,
                'MAILDIRPATH': 'Maildir', 'IMAPLOGINTAG': words[0], 'IMAP_CAPABILITY': self.CAPABILITY, 'IMAP_KEYWORDS': '1',
                'IMAP_USELOCKS': '1', 'IMAP_ULIMITD': '131072', 'IMAP_CHECK_ALL_FOLDERS': '0', 'PROTOCOL': 'IMAP',
                'IMAP_EMPTYTRASH': '', 'IMAP_IDLE_TIMEOUT': '60', 'TCPREMOTEIP': '127.0.0.1', 'TCPREMOTEPORT': '1', 'PATH': SBIN}, **self._as_user())


class Web:
    """A web server for success_url and failure_url. `answers` are the statuses to give in turn, the
    last one for ever; a string is a place to redirect to. `requests` are the paths asked for."""

    def __init__(self, answers=(200,), certificate=None, delay=0):
        answers, self.requests = list(answers), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                time.sleep(delay)
                if isinstance(answer, str):
                    self.send_response(302)
                    self.send_header('Location', answer)
                else:
                    self.send_response(answer)
                self.send_header('Content-Length', '3')
                self.end_headers()
                self.wfile.write(b'ok\n')

            do_POST = do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = '%s://localhost:%d' % ('https' if certificate else 'http', self.server.server_port)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
