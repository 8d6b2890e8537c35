#!/usr/bin/env python3
"""Runs the tests: run.py [-v] [-j N] [--sanitize|--valgrind] [PATTERN ...]

Every function test_* of a file test_*.py is a test and gets a T; every t_*.c is one too: it is
compiled with json.c and mbox.c, unless it includes them, and must exit with 0; every fuzz_*.c is
run for some seconds by fuzz.sh. A line a test, then "N passed, N failed", and ", N skipped" if some were.
"""
import argparse
import contextlib
import glob
import importlib
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
sys.path.insert(0, HERE)
import archive    # noqa: E402
import sample     # noqa: E402
import servers    # noqa: E402

PROGRAM = os.environ.get('IMAP_BACKUP', os.path.join(TOP, 'imap_backup'))
LIMIT_SEC = 300   # one test


class Skip(Exception):
    """The test cannot be run on this machine."""


def children(pid):
    """Processes whose parent this is."""
    out = []
    for path in glob.glob('/proc/[0-9]*/stat'):
        with contextlib.suppress(OSError), open(path) as f:
            if int(f.read().rpartition(')')[2].split()[1]) == pid:
                out.append(int(path.split('/')[2]))
    return out


def memory(pid):
    """All that a process has written to in its memory."""
    out = b''
    with open('/proc/%d/maps' % pid) as maps, open('/proc/%d/mem' % pid, 'rb', 0) as mem:
        for line in maps:
            begin, end = (int(x, 16) for x in line.split()[0].split('-'))
            if ' rw' in line and '[v' not in line:
                mem.seek(begin)
                out += mem.read(end - begin)
    return out


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def __repr__(self):
        return 'status %d\n-- out\n%s\n-- err\n%s' % (self.status, self.out, self.err)


class T:
    """What a test works with: a folder of its own, servers, and the program."""
    shared = {}   # servers live as long as the runner's process

    def __init__(self, name):
        self.name = name
        self.folder = tempfile.mkdtemp(prefix='ib-')
        self.dest = os.path.join(self.folder, 'backup')
        self.path = os.path.join(self.folder, 'config.json')
        self.user = 'u%d%s' % (os.getpid(), name.replace('test_', '').replace('_', ''))
        self.email = self.user + '@example.org'
        self.program = [PROGRAM]   # and what runs it
        self.cleanups = []

    @classmethod
    def base(cls):
        if 'base' not in cls.shared:
            cls.shared['base'] = tempfile.mkdtemp(prefix='ib-run-')
            os.chmod(cls.shared['base'], 0o755)
            cls.shared['certs'] = servers.Certificates(os.path.join(cls.shared['base'], 'certs'))
        return cls.shared['base']

    @property
    def certs(self):
        self.base()
        return self.shared['certs']

    def dovecot(self, kind='', **options):
        """A Dovecot shared by all tests of this process that ask for the same kind."""
        if 'dovecot' + kind not in self.shared:
            self.shared['dovecot' + kind] = servers.Dovecot(
                os.path.join(self.base(), 'dovecot' + kind), self.certs.good, **options)
        return self.shared['dovecot' + kind]

    def account(self, server=None, mode='tls', **more):
        """An account of the config, at a Dovecot (or a scripted server with .port)."""
        server = server or self.dovecot()
        port = server.tls if mode == 'tls' and hasattr(server, 'tls') else server.port
        return dict({'email': self.email, 'username': self.user, 'host': 'localhost', 'port': port,
                     'password': servers.PASSWORD, 'ca_file': self.certs.ca},
                    **({'ssl': True} if mode == 'tls' else {}), **more)

    def config(self, *accounts, **more):
        """Write the config; without accounts it has the one at the house Dovecot."""
        whole = dict({'destination': self.dest, 'timeout': 20, 'retries': 1,
                      'accounts': list(accounts) or [self.account()]}, **more)
        with open(self.path, 'w') as f:
            json.dump(whole, f, indent=1)
        os.chmod(self.path, 0o600)
        return whole

    def run(self, *args, config=True, env=None, timeout=120):
        command = [*self.program, *args] + ([self.path] if config else [])
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder,
                              env=dict(os.environ, **(env or {})), timeout=timeout,
                              stdin=subprocess.DEVNULL)
        return Result(done.returncode, done.stdout.decode(errors='replace'),
                      done.stderr.decode(errors='replace'))

    def backup(self, *args, status=0, **more):
        got = self.run(*args, **more)
        assert got.status == status, 'exit status %d, not %d:\n%s' % (got.status, status, got.err)
        return got

    def archive(self, email=None):
        return os.path.join(self.dest, email or self.email)

    def mbox(self, name='INBOX'):
        return os.path.join(self.archive(), archive.file_name(sample.mutf7(name)))

    def imap(self, server=None):
        """imaplib, logged in at the Dovecot."""
        server = server or self.dovecot()
        imap = archive.login('127.0.0.1', server.port, self.user, servers.PASSWORD)
        self.cleanups.append(lambda: imap.sock.close())
        return imap

    def held(self, server=None):
        """What the server holds, {name on the wire: [archive.Mail]}."""
        imap = self.imap(server)
        held = archive.fetch_all(imap)
        imap.logout()   # a session that lingers would write its idea of a mailbox back
        return held

    def same(self, held, **more):
        complaints = archive.compare_account(self.archive(), held, **more)
        assert not complaints, '\n'.join(complaints[:10])

    def close(self):
        for cleanup in self.cleanups:
            with contextlib.suppress(Exception):
                cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_one(task):
    """(name, reason or None, output) of a test; 'skipped: ...' as a reason does not fail."""
    module, name = task
    output = io.StringIO()
    if module == 'C':
        return run_c(name)
    if module == 'fuzz':
        return run_fuzz(name)
    t = T(name)
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(output):
            getattr(importlib.import_module(module), name)(t)
        reason = None
    except Skip as e:
        reason = 'skipped: %s' % e
    except Exception as e:
        reason = '%s: %s' % (type(e).__name__, str(e).split('\n')[0])
        output.write(traceback.format_exc())
    finally:
        t.close()
    return name, reason, output.getvalue(), time.monotonic() - began


SANITIZED = ['-std=c11', '-D_POSIX_C_SOURCE=200809L', '-D_DEFAULT_SOURCE', '-D_FILE_OFFSET_BITS=64', '-g', '-O1',
             '-fsanitize=address,undefined', '-fno-sanitize-recover=undefined']
REPORTS = os.path.join(TOP, 'build', 'report')


def sanitized():
    """The program built with ASan and UBSan, anew if a source has changed."""
    program = os.path.join(TOP, 'build', 'sanitized')
    sources = [os.path.join(TOP, s) for s in ('imap_backup.c', 'json.c', 'mbox.c', 'imap_backup.h')]
    if not os.path.exists(program) or os.path.getmtime(program) < max(map(os.path.getmtime, sources)):
        os.makedirs(os.path.dirname(program), exist_ok=True)
        subprocess.run([os.environ.get('CC', 'cc'), *SANITIZED, '-o', program, *sources[:3], '-lbearssl', '-lcurl'],
                       check=True)
    return program


def instrument(valgrind):
    """The program built with ASan and UBSan, or wrapped in valgrind: what they find goes to REPORTS.*"""
    os.makedirs(os.path.dirname(REPORTS), exist_ok=True)
    for old in glob.glob(REPORTS + '.*'):
        os.unlink(old)
    if not valgrind:
        os.environ['ASAN_OPTIONS'] = 'detect_leaks=0:verify_asan_link_order=0:log_path=' + REPORTS   # memory is left to exit()
        os.environ['UBSAN_OPTIONS'] = 'print_stacktrace=1:log_path=' + REPORTS
        return sanitized()
    program = os.path.join(TOP, 'build', 'valgrind')
    with open(program, 'w') as f:
        f.write('#!/bin/sh\nexec valgrind -q --trace-children=no --log-file=%s.%%p %s "$@"\n'
                % (shlex.quote(REPORTS), shlex.quote(PROGRAM)))
    os.chmod(program, 0o755)
    return program


def run_c(path):
    """Compile and run a unit test under ASan and UBSan."""
    name, began = os.path.basename(path)[:-2], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        binary = os.path.join(folder, name)
        with open(path) as f:
            unit = f.read()
        sources = [os.path.join(TOP, s) for s in ('json.c', 'mbox.c') if '"../%s"' % s not in unit]
        command = [os.environ.get('CC', 'cc'), *SANITIZED, '-o', binary, path, *sources, '-lbearssl',
                   '-lcurl']
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0:
            done = subprocess.run([binary], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  cwd=folder, timeout=LIMIT_SEC)
        reason = None if done.returncode == 0 else 'exit status %d' % done.returncode
        return name, reason, done.stdout.decode(errors='replace'), time.monotonic() - began


def run_fuzz(path):
    name, began = os.path.basename(path)[:-2], time.monotonic()
    done = subprocess.run([os.path.join(HERE, 'fuzz.sh'), '-s', '4', name[5:]], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=LIMIT_SEC)
    reason = None if done.returncode == 0 else 'exit status %d' % done.returncode
    return name, reason, done.stdout.decode(errors='replace'), time.monotonic() - began


def worker(tasks, results):
    signal.signal(signal.SIGINT, signal.default_int_handler)   # what a script starts with "&" ignores it
    for task in iter(tasks.get, None):
        results.put(run_one(task))
    for server in T.shared.values():
        if hasattr(server, 'stop'):
            server.stop()
    shutil.rmtree(T.shared.get('base', '/nonexistent'), ignore_errors=True)


def main():
    global PROGRAM
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('-v', action='store_true', help='show what tests print')
    parser.add_argument('-j', type=int, default=min(2, os.cpu_count() or 1), help='tests at a time')
    parser.add_argument('pattern', nargs='*', help='run only tests whose name contains one of these')
    parser.add_argument('--sanitize', action='store_true', help='the program under ASan and UBSan')
    parser.add_argument('--valgrind', action='store_true', help='the program under valgrind')
    options = parser.parse_args()
    instrumented = options.sanitize or options.valgrind
    if instrumented:
        PROGRAM = instrument(options.valgrind)
    tests = [('C', path) for path in sorted(glob.glob(os.path.join(HERE, 't_*.c')))]
    tests += [('fuzz', path) for path in sorted(glob.glob(os.path.join(HERE, 'fuzz_*.c')))]
    for path in sorted(glob.glob(os.path.join(HERE, 'test_*.py'))):
        module = importlib.import_module(os.path.basename(path)[:-3])
        tests += [(module.__name__, name) for name in vars(module) if name.startswith('test_')]
    tests = [t for t in tests if not options.pattern or any(p in t[1] for p in options.pattern)]
    if instrumented:   # units are sanitized always; the memory measured would be the sanitizer's
        tests = [t for t in tests if t[0] not in ('C', 'fuzz') and 'memory' not in t[1] and
                 'million' not in t[1] and 'core_dump' not in t[1]]
    if not os.access(PROGRAM, os.X_OK):
        sys.exit('%s is missing: run make' % PROGRAM)
    tasks, results = multiprocessing.Queue(), multiprocessing.Queue()
    for test in tests:
        tasks.put(test)
    for _ in range(options.j):
        tasks.put(None)
    crew = [multiprocessing.Process(target=worker, args=(tasks, results)) for _ in range(options.j)]
    for process in crew:
        process.start()
    failed = skips = 0
    for _ in tests:
        name, reason, output, sec = results.get()
        skipped = reason is not None and reason.startswith('skipped')
        skips += skipped
        failed += reason is not None and not skipped
        print('%s %s%s  (%.1f s)' % ('ok  ' if reason is None else 'skip' if skipped else 'FAIL', name,
                                     ': ' + reason if reason else '', sec), flush=True)
        if output and (options.v or (reason and not skipped)):
            print('    ' + output.rstrip().replace('\n', '\n    '), flush=True)
    for process in crew:
        process.join()
    passed = len(tests) - failed - skips
    for report in glob.glob(REPORTS + '.*') if instrumented else ():
        with open(report, errors='replace') as f:
            text = f.read()
        failed += text != ''   # valgrind leaves an empty one
        print(text and 'FAIL %s\n%s' % (report, text), end='')
    print('%d passed, %d failed' % (passed, failed) + (', %d skipped' % skips if skips else ''))
    sys.exit(failed > 0)


if __name__ == '__main__':
    sys.modules.setdefault('run', sys.modules['__main__'])
    main()
