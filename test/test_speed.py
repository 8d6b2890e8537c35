"""Counted, not timed: what the speed on a long line rests on."""
import os
import signal
import subprocess
import time

import archive
import imapd
import sample


def test_an_empty_archive_asks_at_once_for_many_mails(t):
    """EXAMINE is answered only when the search and ten commands for ten mails each are there."""
    def hook(session, tag, name, args):
        if name == 'EXAMINE':
            session.need(lambda data: data if data.count(b'\n') >= 11 else None)
    box = imapd.Mailbox(sample.many(100))
    with imapd.Server({'INBOX': box}, hook=hook) as server:
        t.config(t.account(server, mode='plain', ssl=False), email_batch_size=10, timeout=5, retries=0)
        t.backup()
        assert len(server.lines('UID FETCH')) == 10 and not server.faults, server.lines()


def all_held(t, boxes):
    for name, box in boxes.items():
        mails = [archive.Mail(m.uid, m.data, archive.state_of(m.flags), m.when,
                              imapd.header_fields(m.data, 'FROM TO CC DATE SUBJECT')) for m in box.mails]
        complaints = archive.compare(t.mbox(name), mails)
        assert not complaints, complaints


def test_the_next_mailbox_is_asked_before_the_last_has_answered(t):
    """No EXAMINE is answered before the next one is there, in a first backup and where only flags changed."""
    left = []

    def hook(session, tag, name, args):
        if name == 'EXAMINE':
            left.remove(args.split('"')[1])
            if left:
                session.need(lambda data: data if b'EXAMINE' in data else None)
    boxes = {'b%d' % i: imapd.Mailbox(sample.many(12 - i, i)) for i in range(5)}
    with imapd.Server(boxes, hook=hook) as server:
        t.config(t.account(server, mode='plain', ssl=False), email_batch_size=10, timeout=5, retries=0,
                 processes_per_account=1)
        for _ in range(2):
            left[:] = boxes
            t.backup()
            assert not left and not server.faults
            all_held(t, boxes)
            for box in boxes.values():
                box.flag(3, '\\Answered')


def test_what_was_not_foreseen_is_fetched_after_the_next_mailbox(t):
    """A mail that comes between STATUS and EXAMINE; a worker that dies with the next mailbox begun."""
    boxes = {'INBOX': imapd.Mailbox(sample.many(20)), 'next': imapd.Mailbox(sample.many(3, 2)),
             'last': imapd.Mailbox(sample.many(2, 3))}

    def adds(session, tag, name, args):
        if name == 'EXAMINE' and len(boxes['INBOX'].mails) == 20:
            boxes['INBOX'].add(next(sample.many(1, 4)).data)
    with imapd.Server(boxes, hook=adds) as server:
        t.config(t.account(server, mode='plain', ssl=False), timeout=5, retries=0, processes_per_account=1)
        t.backup()
        opened = [line.split('"')[1] for line in server.lines('EXAMINE')]
        assert opened == ['INBOX', 'next', 'last', 'INBOX'], opened
        assert len(server.lines('UID FETCH')) == 4, server.lines()
        all_held(t, boxes)

        def kills(session, tag, name, args):
            if name == 'UID_FETCH' and 'BODY.PEEK[]' in args and opened:
                session.need(lambda data: data if data.count(b'EXAMINE') else None)
                opened.clear()
                for task in os.listdir('/proc/%d/task' % running.pid):
                    with open('/proc/%d/task/%s/children' % (running.pid, task)) as f:
                        for worker in f.read().split():
                            os.kill(int(worker), signal.SIGKILL)
        server.hook = kills
        for box in boxes.values():
            box.renumber()
            box.add(next(sample.many(1, 5)).data)
        running = subprocess.Popen([*t.program, t.path], stderr=subprocess.PIPE)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 0 and b'a worker died' in said, said
        all_held(t, boxes)


def test_the_second_connection_gets_its_share(t):
    """Of an account with few mailboxes, too: the first does not take all of them ahead."""
    boxes = {name: imapd.Mailbox(sample.many(150, i)) for i, name in enumerate(('INBOX', 'A'))}
    fetched = set()

    def hook(session, tag, name, args):
        if name == 'UID_FETCH' and 'BODY.PEEK[]' in args:
            fetched.add((session.number, session.name))
            time.sleep(.1)   # as long as a login takes
    with imapd.Server(boxes, hook=hook) as server:
        t.config(t.account(server, mode='plain', ssl=False), timeout=20, retries=0)
        t.backup()
        all_held(t, boxes)
        assert {number for number, _ in fetched} == {1, 2}, fetched


def test_mostly_gaps_are_not_asked_for(t):
    box = imapd.Mailbox(sample.many(5))
    box.add(next(sample.many(1, 2)).data, uid=100_000)
    with imapd.Server({'INBOX': box}) as server:
        t.config(t.account(server, mode='plain', ssl=False), email_batch_size=10)
        t.backup()
        assert len(server.lines('UID FETCH')) == 2, server.lines()


def test_a_lost_index_costs_two_flights(t):
    """The Message-IDs are asked for along with EXAMINE, with the flags; then whether the last mail is whole."""
    box = imapd.Mailbox(sample.many(100))
    with imapd.Server({'INBOX': box}) as server:
        t.config(t.account(server, mode='plain', ssl=False), header_batch_size=10, timeout=5, retries=0)
        t.backup()
        os.unlink(t.mbox() + '.index')
        box.flag(7, '\\Flagged')
        server.forget()

        def hook(session, tag, name, args):
            if name == 'EXAMINE':
                session.need(lambda data: data if data.count(b'\n') >= 11 else None)
        server.hook = hook
        t.backup()
        assert len(server.lines('UID FETCH')) == 10 and len(server.lines('UID SEARCH')) == 1, server.lines()
        with open(t.mbox(), 'rb') as f:
            assert f.read().count(b'X-Mozilla-Status: 0004\n') == 1


def test_a_worker_that_is_told_to_stop_leaves_its_mailboxes_to_another(t):
    """SIGTERM to a worker alone, with the next mailbox stored already: nothing is left out, or out of the summary."""
    boxes = {'INBOX': imapd.Mailbox(sample.many(20)), 'next': imapd.Mailbox(sample.many(3, 2))}

    def stops(session, tag, name, args):
        if name == 'EXAMINE' and len(boxes['INBOX'].mails) == 20:
            boxes['INBOX'].add(next(sample.many(1, 4)).data)
        elif name == 'EXAMINE' and 'INBOX' in args and len(server.sessions) == 1:
            for worker in open('/proc/%d/task/%d/children' % (running.pid, running.pid)).read().split():
                os.kill(int(worker), signal.SIGTERM)
    with imapd.Server(boxes, hook=stops) as server:
        t.config(t.account(server, mode='plain', ssl=False), timeout=5, retries=0, processes_per_account=1)
        running = subprocess.Popen([*t.program, t.path], stderr=subprocess.PIPE)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 0 and b'24 new' in said, said
        all_held(t, boxes)
