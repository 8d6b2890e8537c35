"""Counted, not timed: what the speed on a long line rests on."""
import os

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
        assert len(server.lines('UID FETCH')) == 10 and len(server.lines('UID SEARCH')) == 2, server.lines()
        with open(t.mbox(), 'rb') as f:
            assert f.read().count(b'X-Mozilla-Status: 0004\n') == 1
