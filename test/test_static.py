"""The static files of static.sh: that for this machine and mips, or with STATIC=all in the
environment each of them, under qemu and on the least CPU that it is meant for.

What one of them writes must be what ./imap_backup writes, octet by octet, and one must go on where
the other stopped: different word sizes and byte orders share an archive.
"""
import collections
import functools
import os
import random
import re
import shutil
import struct
import subprocess
import sys

import archive
import sample
import servers
from run import HERE, PROGRAM, TOP, Skip

Target = collections.namedtuple('Target', 'name budget tools musl qemu cpu flags')

with open(os.path.join(HERE, 'targets.txt')) as f:
    TARGETS = [Target(*line.split(None, 6)) for line in f if line[0] != '#']
MACHINE = subprocess.run(['gcc', '-dumpmachine'], stdout=subprocess.PIPE).stdout.decode().strip()
NATIVE = next((t for t in TARGETS if t.tools == MACHINE), None)


def built(target):
    """Build it, if need be; the command that runs it."""
    servers.tool(os.path.join(HERE, 'static.sh'), target.name)
    binary = os.path.join(TOP, 'build', 'imap_backup-' + target.name)
    if target == NATIVE:
        return [binary]
    qemu = shutil.which('qemu-%s-static' % target.qemu) or shutil.which('qemu-' + target.qemu)
    return [qemu, '-cpu', target.cpu, binary]


def program_header_types(binary):
    with open(binary, 'rb') as f:
        elf = f.read(4096)
    order, wide = '<>'[elf[5] - 1], elf[4] == 2
    at, = struct.unpack_from(order + ('Q' if wide else 'I'), elf, 32 if wide else 28)
    size, n = struct.unpack_from(order + 'HH', elf, 54 if wide else 42)
    return [struct.unpack_from(order + 'I', elf, at + size * i)[0] for i in range(n)]


def check_archive(target, t):
    """Size, --version, a backup over TLS, success_url over https, archives that change hands."""
    theirs, ours = built(target), [PROGRAM]
    binary = theirs[-1]
    size = os.path.getsize(binary)
    assert size <= int(target.budget), '%s: %d octets; targets.txt allows %s' % (binary, size, target.budget)
    interpreter, dynamic = 3, 2
    assert not {interpreter, dynamic} & set(program_header_types(binary)), 'not static'
    t.program = theirs
    got = t.backup('--version', config=False)
    assert re.match(r'imap_backup \d.*BearSSL', got.out), got

    sample.deliver(t.imap(), 'INBOX', [m for _, m in sample.awkward()])   # with dates until 2100
    for name, mails in sample.boxes(mails=60).items():
        sample.deliver(t.imap(), name, mails[:25])
    web = servers.Web(certificate=t.certs.good)
    t.cleanups.append(web.stop)
    summaries = {}

    def run(program, name, *options):
        t.program, t.dest = program, os.path.join(t.folder, name)
        # One command a mailbox: the server mixes the mails of several, each time in another way.
        t.config(success_url='%s/%s' % (web.url, name), ca_file=t.certs.ca, email_batch_size=1000)
        got = t.backup(*options)
        warned = re.sub('(?m)^.*mails left out although.*$', '', got.err)   # the sample has one
        assert 'rebuil' not in got.err and 'arning' not in warned, got.err
        summaries[name] = re.search(r': (\d+ mailboxes .*) in [\d.]+ s', got.err).group(1)
        return archive.digests(t.dest)

    def both(status):
        first, second = run(ours, 'a'), run(theirs, 'b')
        assert first == second and len(first) > 5, (first, second)
        assert summaries['a'] == summaries['b'], summaries
        assert status in summaries['a'], summaries
        assert web.requests == ['/a', '/b'], web.requests
        web.requests.clear()

    both(' new')
    t.same(t.held())
    for one, other in (('a', 'c'), ('b', 'a'), ('c', 'b')):   # each goes on with what the other began
        os.rename(os.path.join(t.folder, one), os.path.join(t.folder, other))
    t.dovecot().trace(t.user)
    both('(11 without news): 0 new')
    assert not [c for c in t.dovecot().commands(t.user) if re.match('EXAMINE|UID', c)]
    before = t.held()['INBOX']
    imap = t.imap()
    sample.deliver(imap, 'INBOX', [sample.exact(random.Random(t.name), 70_000, '\\Answered')])
    imap.select('INBOX')
    imap.uid('STORE', '2:4', '+FLAGS', '(\\Flagged)')
    imap.expunge()   # the samples have some that are \Deleted
    held = t.held()
    gone = [m for m in before if m.uid not in {x.uid for x in held['INBOX']}]
    both(': 1 new, 3 gone, 0 back')
    t.same(held, gone={'INBOX': gone})


def check_large(target, t):
    """An archive beyond 4 GB, which costs no disk: appended to, and changed behind 4 GB."""
    few = [sample.mail(random.Random(i), 'mail %d' % i, when=2**31 + i) for i in range(4)]
    sample.deliver(t.imap(), 'INBOX', few[:3])
    t.config()
    t.backup()
    with open(t.mbox(), 'rb') as f:
        mails = f.read()
    with open(t.mbox(), 'wb') as f:
        f.write(b'From MAILER-DAEMON Mon Jan  6 00:00:00 2020\nX-Mozilla-Status: 0001\n'
                b'Message-ID: <huge@x>\n\n')
        f.seek(5 << 30)
        f.write(b'\n\n' + mails)
    os.unlink(t.mbox() + '.index')
    t.backup()   # the index is made here, and used there
    t.program = built(target)
    imap = t.imap()
    sample.deliver(imap, 'INBOX', few[3:])
    imap.select('INBOX')
    imap.uid('STORE', '2', 'FLAGS', '(\\Flagged)')
    got = t.backup('-v')
    assert 'INBOX: 1 new' in got.err and 'rebuil' not in got.err, got.err
    with open(t.mbox(), 'rb') as f:
        f.seek((5 << 30) + 2)
        with open(os.path.join(t.folder, 'tail.mbox'), 'wb') as tail:
            shutil.copyfileobj(f, tail)
    complaints = archive.compare(os.path.join(t.folder, 'tail.mbox'), t.held()['INBOX'])
    assert not complaints, complaints


for target in TARGETS:
    if target in (NATIVE, next(t for t in TARGETS if t.name == 'mips')) or os.environ.get('STATIC') == 'all':
        globals()['test_static_%s' % target.name] = functools.partial(check_archive, target)
        if '64' not in target.name:
            globals()['test_static_%s_5_gb' % target.name] = functools.partial(check_large, target)


def peaks(t):
    """Back up; the largest VmHWM of the run's processes, in octets."""
    sizes = [int(kb) * 1024 for kb in t.backup(timeout=280).out.split()]
    assert len(sizes) >= 2, sizes
    return max(sizes)


def test_static_memory(t):
    """1 MiB, and 24 octets a mail, with all the roots that the system trusts."""
    if NATIVE is None:
        raise Skip('no static build for ' + MACHINE)
    t.program = [sys.executable, os.path.join(HERE, 'memory.py')] + built(NATIVE)
    bundle = os.path.join(t.folder, 'roots.pem')
    with open(bundle, 'wb') as f:
        for path in ('/etc/ssl/certs/ca-certificates.crt', t.certs.ca):
            with open(path, 'rb') as source:
                f.write(source.read())
    web = servers.Web(certificate=t.certs.good)
    t.cleanups.append(web.stop)
    t.config(t.account(ca_file=bundle), ca_file=bundle, success_url=web.url)
    text = sample.text(random.Random(1), 50_000_000)
    sample.deliver(t.imap(), 'INBOX', [sample.mail(random.Random(1), 'large', text)])
    large = peaks(t)
    print('a mail of 50 MB: %d KB' % (large >> 10))
    sample.fill_maildir(t.dovecot().maildir(t.user, 'many'), sample.many(100_000))
    t.dovecot().own(t.dovecot().home(t.user))
    many = peaks(t)
    os.unlink(t.mbox('many') + '.index')
    again = peaks(t)
    print('100,000 mails: %d KB; with a lost index: %d KB' % (many >> 10, again >> 10))
    assert len(web.requests) == 3
    assert large <= 1 << 20 and max(many, again) <= (1 << 20) + 24 * 100_000


# What the package recipes use of OpenWrt's build system.
OPENWRT = """
INSTALL_DIR = install -d -m0755
INSTALL_BIN = install -m0755
CP = cp -fpR
TARGET_CC = cc
TARGET_AR = ar
TARGET_CFLAGS = -Os
TARGET_CPPFLAGS = -I$(TOPDIR)/staging/usr/include
TARGET_LDFLAGS = -L$(TOPDIR)/staging/usr/lib
PKG_BUILD_DIR = $(TOPDIR)/build/$(PKG_NAME)-$(PKG_VERSION)
define Build/Prepare
	mkdir -p $(TOPDIR)/build
	tar -C $(TOPDIR)/build -xf $(DL)/$(PKG_SOURCE)
endef
define BuildPackage
all:
	$$(call Build/Prepare)
	$$(call Build/Compile)
	$$(call Build/InstallDev,$(TOPDIR)/staging)
	$$(call Package/$(1)/install,$(TOPDIR)/root)
endef
"""


def test_openwrt_recipes(t):
    """They do not run in an SDK here, but everything that they say is done once."""
    if NATIVE is None:
        raise Skip('no static build for ' + MACHINE)
    built(NATIVE)   # fetches BearSSL
    for name, text in (('rules.mk', ''), ('package.mk', OPENWRT)):
        with open(os.path.join(t.folder, name), 'w') as f:
            f.write(text)
    for package in ('bearssl', 'imap_backup'):
        servers.tool('make', '-j2', '-C', os.path.join(HERE, 'openwrt', package), 'TOPDIR=' + t.folder,
                     'INCLUDE_DIR=' + t.folder, 'DL=' + os.path.join(TOP, '.cache', 'src'),
                     env={'PATH': os.environ['PATH']})
    t.program = [os.path.join(t.folder, 'root', 'usr', 'bin', 'imap_backup')]
    needed = servers.tool('readelf', '-d', t.program[0])
    assert 'libcurl' in needed and 'bearssl' not in needed, needed
    sample.deliver(t.imap(), 'INBOX', [sample.mail(random.Random(1), 'mail')])
    t.config()
    t.backup()
    t.same(t.held())
