"""What bare devices do to a program: no clock, no CA bundle, no home, little else on the disk, and a
file system without modes on which names are the same in any case."""
import glob
import os
import random
import re
import shutil
import time

import archive
import imapd
import sample
import servers
from run import TOP, Skip
from test_static import NATIVE, built

DAY = 86400

# time() that says what the environment's CLOCK says.
CLOCK = '#include <stdlib.h>\n#include <time.h>\n' \
    'time_t time(time_t *t) { time_t now = atoll(getenv("CLOCK")); if (t) *t = now; return now; }\n'


def clock(t, sec):
    """The environment for a clock that stands at this second."""
    source, library = (os.path.join(t.folder, 'clock' + x) for x in ('.c', '.so'))
    if not os.path.exists(library):
        with open(source, 'w') as f:
            f.write(CLOCK)
        servers.tool('cc', '-shared', '-fPIC', '-o', library, source)
    return {'LD_PRELOAD': library, 'CLOCK': str(int(sec))}


def few(t, n=3):
    sample.deliver(t.imap(), 'INBOX', [sample.mail(random.Random(i), 'mail %d' % i) for i in range(n)])


def server_with(t, certificate):
    server = imapd.Server({'INBOX': imapd.Mailbox([sample.mail(random.Random(1), 'mail')])},
                          certificate=t.certs.make(certificate), tls=True)
    t.cleanups.append(server.stop)
    return server


def test_a_clock_before_the_build_date(t):
    few(t)
    t.config()
    got = t.backup(env=clock(t, 7))
    assert "clock says 1970-01-01, which cannot be: certificates are judged as of 20" in got.err, got.err
    t.same(t.held())
    built_day = re.search(r'as of (\S+)', got.err).group(1)
    assert time.time() - DAY * 400 < time.mktime(time.strptime(built_day, '%Y-%m-%d')) < time.time()


def test_a_clock_before_the_certificate(t):
    """Newer than the program: its own first day counts, but only if the clock is wrong."""
    t.config(t.account(server_with(t, 'future')))
    got = t.backup(status=1)
    assert re.search(r"not valid before \S+, and this device's clock says 20", got.err), got.err
    t.config(t.account(server_with(t, 'future_other')), retries=0)
    got = t.backup(status=1, env=clock(t, 7))   # what nobody has signed tells no time
    assert 'not valid before' in got.err and 'is wrong' not in got.err, got.err
    t.config(t.account(server_with(t, 'future')), retries=0)
    got = t.backup(env=clock(t, 7))
    assert re.search(r'not valid before (\S+), and this device.s clock is wrong: taking', got.err), got.err


def test_a_wrong_clock_trusts_no_expired_certificate(t):
    t.config(t.account(server_with(t, 'expired')))
    got = t.backup(status=1, env=clock(t, 7))
    assert 'the certificate expired on' in got.err, got.err


def test_a_clock_before_the_web_servers_certificate(t):
    """The same for success_url, where libcurl has BearSSL too: the static program, linked with that clock."""
    if NATIVE is None:
        raise Skip('no static build for this machine')
    few(t)
    wrong, folder = clock(t, 7), os.path.dirname(built(NATIVE)[-1])
    t.program = [os.path.join(t.folder, 'static')]
    servers.tool(os.path.join(TOP, '.cache', NATIVE.name, 'cc'), '-o', *t.program,
                 *glob.glob(os.path.join(folder, NATIVE.name, '*.o')), os.path.join(t.folder, 'clock.c'),
                 '-lcurl', '-lbearssl')
    web = servers.Web(certificate=t.certs.make('future'))
    t.cleanups.append(web.stop)
    t.config(success_url=web.url + '/ok', ca_file=t.certs.ca)
    got = t.backup(env=clock(t, time.time()))
    assert 'warning: https' in got.err and not web.requests, got.err
    got = t.backup(env=wrong)
    assert 'warning: https' not in got.err and web.requests == ['/ok'], got.err


class Jail:
    """A root file system with the static program, /dev/urandom, /dev/null and nothing else, read-only
    but for /mnt."""

    def __init__(self, t):
        if NATIVE is None:
            raise Skip('no static build for this machine')
        self.root = os.path.join(t.folder, 'root')
        self.mnt = os.path.join(self.root, 'mnt')
        for name in ('', 'dev', 'mnt'):
            os.mkdir(os.path.join(self.root, name))
        self.unshare = ['unshare', '-m']
        bind = ['mount', '--bind', self.mnt, self.mnt]
        try:
            try:
                servers.tool(*self.unshare, *bind)
            except RuntimeError:   # the root of a chroot need not be a mount; then what is around may see it
                self.unshare += ['--propagation', 'unchanged']
                servers.tool(*self.unshare, *bind)
            if self.mnt in open('/proc/self/mountinfo').read():
                servers.tool('umount', self.mnt)
                raise RuntimeError('mounts are shared with what is around this chroot')
            for name, minor in (('null', 3), ('urandom', 9)):
                os.mknod(os.path.join(self.root, 'dev', name), 0o20666, os.makedev(1, minor))
        except (OSError, RuntimeError) as e:
            raise Skip('no right to mount: %s' % e)
        shutil.copy(built(NATIVE)[-1], os.path.join(self.root, 'imap_backup'))
        shutil.copy(t.certs.ca, os.path.join(self.root, 'ca.pem'))

    def enter(self, t, *args):
        """Run it there, with an empty environment."""
        shutil.copy(t.path, os.path.join(self.root, 'config.json'))
        script = 'set -e; mount --bind "$0" "$0"; mount --bind "$0/mnt" "$0/mnt"; ' \
            'mount -o remount,bind,ro "$0"; cd "$0"; PATH=$PATH:/usr/sbin; ' \
            'exec env -i "$(command -v chroot)" "$0" /imap_backup "$@"'
        t.program, t.path = [*self.unshare, 'sh', '-c', script, self.root, *args], '/config.json'
        return t.run()


def test_nothing_but_the_program(t):
    """No libraries, no /etc, no /tmp, no HOME, a read-only root, an address for a host name."""
    few(t)
    jail = Jail(t)
    t.config(t.account(host='127.0.0.1', ca_file='/ca.pem'), destination='/mnt/backup')
    got = jail.enter(t)
    assert got.status == 0, got
    t.dest = os.path.join(jail.mnt, 'backup')
    t.same(t.held())


def test_a_read_only_destination(t):
    few(t)
    jail = Jail(t)
    t.config(t.account(host='127.0.0.1', ca_file='/ca.pem'), destination='/backup')
    got = jail.enter(t)
    assert got.status == 1 and 'Read-only file system' in got.err, got


def test_a_device_without_ca_bundle(t):
    """The error says where one is looked for and what to do; --check shows the fingerprint; it works."""
    few(t)
    jail = Jail(t)
    account = t.account(host='127.0.0.1', ca_file=None)
    del account['ca_file']
    path = t.path
    t.config(account, destination='/mnt/backup')
    got = jail.enter(t)
    assert got.status == 1 and not os.path.exists(os.path.join(jail.mnt, 'backup', t.email, 'INBOX.mbox'))
    for text in ('no CA bundle', '/etc/ssl/certs/ca-certificates.crt', 'cacert.pem', 'tls_fingerprint'):
        assert text in got.err, got
    t.path = path
    got = jail.enter(t, '--check')
    assert t.certs.fingerprint() in got.out + got.err, got
    t.path = path
    t.config(dict(account, tls_fingerprint=t.certs.fingerprint()), destination='/mnt/backup')
    got = jail.enter(t)
    assert got.status == 0, got


def test_exfat(t):
    """A stick with exFAT: no modes, and names are the same in any case. In user space, and only where
    that may be mounted."""
    image, at = os.path.join(t.folder, 'image'), os.path.join(t.folder, 'stick')
    os.mkdir(at)
    with open(image, 'wb') as f:
        f.truncate(40 << 20)
    try:
        path = {'PATH': servers.SBIN}
        servers.tool('mkfs.exfat', image, env=path)
        loop = servers.tool('losetup', '-f', '--show', image, env=path).strip()
        t.cleanups.insert(0, lambda: servers.tool('losetup', '-d', loop, env=path))
        servers.tool('mount.exfat-fuse', loop, at, env=path)
        t.cleanups.insert(0, lambda: servers.tool('umount', at, env=path))
    except (OSError, RuntimeError) as e:
        raise Skip(str(e).split('\n')[0])
    t.dest = os.path.join(at, 'backup')
    names = ('INBOX', 'Lists', 'a "quoted" \\ name', 'Entwürfe')
    for name in names:
        sample.deliver(t.imap(), name, [sample.mail(random.Random(name), name) for _ in range(3)])
    t.config()
    t.backup()
    before = archive.digests(t.dest)
    assert '(4 without news): 0 new' in t.backup().err
    for name in names:
        complaints = archive.compare(t.mbox(name), t.held()[sample.mutf7(name)])
        assert not complaints, complaints
    sample.deliver(t.imap(), 'LISTS', [sample.mail(random.Random(2), 'other')])
    got = t.backup(status=1)
    assert 'LISTS' in got.err and archive.digests(t.dest) == before, got.err
