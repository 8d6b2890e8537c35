"""What must hold on the worst day: kills, power cuts, disk faults. What torture.py has found, each by
itself, and a sample of its campaign."""
import os
import random

import archive
import imapd
import sample
import torture
from run import PROGRAM, Skip


def rig(t, *args, **more):
    """A Rig that ends with the test."""
    with open(PROGRAM, 'rb') as f:
        if b'/ld' not in f.read(4096):
            raise Skip('nothing can be interposed in a static program')
    made = torture.Rig(*args, **more)
    t.cleanups.append(made.close)
    return made


def mailbox(*labels, **more):
    rng = random.Random(1)
    return imapd.Mailbox([sample.mail(rng, label, **more) for label in labels])


def backed_up(r, box):
    """One run, all well; a copy of the mailbox, to be changed."""
    r.settle(box, 'undisturbed')
    r.remember(box)
    return torture.copy_box(box)


def index(r):
    with open(r.mbox() + '.index', 'rb') as f:
        return f.read()


def killed_everywhere(r, was, box, after):
    """Died at each operation of the run that finds 'box' where 'was' had been; then the server has 'after'."""
    step = torture.Step(r, 'killed', was, box)
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.kill_at(r, step, n, 'before', after)


def test_flags_of_a_mail_that_is_back(t):
    """Told before its UID was known, or with it."""
    for session in (torture.Searching, torture.Plain):
        r = rig(t, session)
        was = mailbox('a', 'b', flags='')
        box = backed_up(r, was)
        box.expunge(1)
        box = backed_up(r, box)
        box.add(was.mails[0].data, '\\Flagged', was.mails[0].when)
        backed_up(r, box)


def test_flags_changed_after_a_kill(t):
    """The UIDs of mails that a killed run has stored lie above the UIDNEXT of the index's header."""
    r = rig(t)
    was = mailbox('a', 'b', flags='')
    box = backed_up(r, was)
    for m in mailbox('c', 'd', 'e', flags='').mails:
        box.add(m.data)
    after = torture.copy_box(box)
    after.flag(3, '\\Seen')
    killed_everywhere(r, was, box, after)


def test_states_that_a_killed_run_has_written(t):
    """Flags and marks as gone, in the mbox but not yet in the index; then all is as it was before."""
    r = rig(t)
    was = mailbox('a', 'b', 'c', flags='')
    box = backed_up(r, was)
    box.flag(1, '\\Seen')
    box.expunge(2)
    killed_everywhere(r, was, box, torture.then_wavers(was, box))


def test_states_newer_than_an_older_index(t):
    r = rig(t)
    box = backed_up(r, mailbox('a', 'b', flags=''))
    old = index(r)
    box.flag(1, '\\Seen')
    box.add(b'Message-ID: <later@x>\r\n\r\n')
    box = backed_up(r, box)
    with open(r.mbox() + '.index', 'wb') as f:
        f.write(old)
    box.flag(1, '')
    backed_up(r, box)


def test_a_full_disk_stops_cleanly(t):
    """No part of a mail is left, and the next run goes on by itself."""
    r = rig(t)
    box = imapd.Mailbox(torture.first_mails(random.Random(1)))
    step = torture.Step(r, 'full', imapd.Mailbox(), box)
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.fault_at(r, step, n, 'ENOSPC', ever=True)
