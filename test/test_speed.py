"""Counted, not timed: what the speed on a long line rests on."""
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
