#!/usr/bin/env python3
"""memory.py COMMAND...: the peak resident memory of each process of a program, in KB, a line each.

VmHWM is read when a process ends, which ptrace tells; getrusage() would count what forked it, too.
What the command prints goes to stderr; its exit status is ours.
"""
import ctypes
import os
import re
import subprocess
import sys

TRACEME, CONT, SETOPTIONS = 0, 7, 0x4200
FORK, VFORK, CLONE, EXIT, EXITKILL = 1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 20
EVENT_EXIT, SIGTRAP, SIGSTOP, WALL = 6, 5, 19, 0x40000000

libc = ctypes.CDLL(None, use_errno=True)


def ptrace(request, pid, data=0):
    if libc.ptrace(request, pid, None, ctypes.c_void_p(data)) < 0:
        raise OSError(ctypes.get_errno(), 'ptrace')


def main():
    process = subprocess.Popen(sys.argv[1:], stdout=2, preexec_fn=lambda: ptrace(TRACEME, 0))
    first = process.pid   # and `process` stays: subprocess would wait for what nobody refers to
    known, status = set(), 1
    while True:
        try:
            pid, what = os.waitpid(-1, WALL)
        except ChildProcessError:
            return status
        if not os.WIFSTOPPED(what):
            if pid == first:
                status = os.WEXITSTATUS(what) if os.WIFEXITED(what) else 128 + os.WTERMSIG(what)
            continue
        signal = os.WSTOPSIG(what)
        if what >> 16 == EVENT_EXIT:
            with open('/proc/%d/status' % pid) as f:
                print(re.search(r'VmHWM:\s*(\d+)', f.read()).group(1), flush=True)
        if pid == first and not known:
            ptrace(SETOPTIONS, pid, FORK | VFORK | CLONE | EXIT | EXITKILL)
        if pid not in known and signal in (SIGTRAP, SIGSTOP) or signal == SIGTRAP:
            signal = 0   # how tracing begins, and its events
        known.add(pid)
        ptrace(CONT, pid, signal)


if __name__ == '__main__':
    sys.exit(main())
