"""What --json prints: one object, valid whatever happened."""
import json
import re
import signal
import subprocess
import time

import imapd
import sample

KEYS = ['program', 'version', 'mode', 'dry_run', 'status', 'errors', 'began', 'seconds', 'accounts']
ACCOUNT = ['email', 'seconds', 'mailboxes', 'unchanged', 'new', 'gone', 'back', 'duplicates', 'octets', 'failures',
           'errors', 'boxes']


def told(text, status, mode='backup'):
    said = json.loads(text)
    assert list(said) == KEYS and said['status'] == status and said['mode'] == mode, text
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', said['began']), text
    assert all(list(a) == ACCOUNT for a in said['accounts']), text
    return said


def test_json(t):
    """Backup, dry run, list, check; names that want escapes; a mailbox that fails; wrong words."""
    boxes = {'INBOX': imapd.Mailbox(sample.many(20)), 'a "b" \\c': imapd.Mailbox(sample.many(3, 2)),
             'bad': imapd.Mailbox(sample.many(2, 3))}

    with imapd.Server(boxes) as server:
        t.config(t.account(server, mode='plain', ssl=False))
        said = told(t.run('--json', '-n').out, 0)
        assert said['dry_run'] and said['accounts'][0]['new'] == 25, said
        said = told(t.run('--json', '-q').out, 0)
        account = said['accounts'][0]
        assert account['new'] == 25 and account['mailboxes'] == 3 and account['octets'] > 10000, said
        assert sorted(b['name'] for b in account['boxes']) == sorted(boxes), said
        assert {b['file'] for b in account['boxes']} == {'INBOX.mbox', 'a %22b%22 %5Cc.mbox', 'bad.mbox'}, said
        said = told(t.run('--json').out, 0)
        assert said['accounts'][0]['unchanged'] == 3 and said['accounts'][0]['boxes'] == [], said
        said = told(t.run('--json', '--list').out, 0, 'list')
        assert sorted((b['messages'], b['archived']) for b in said['accounts'][0]['boxes']) == [
            (2, 2), (3, 3), (20, 20)], said
        told(t.run('--json', '--check').out, 0, 'check')
        told(t.run('--js', '--list').out, 0, 'list')   # as any option may be cut
    t.config(t.account(server, mode='plain', ssl=False), retries=0)
    said = told(t.run('--json').out, 1)   # nobody listens any more
    assert said['accounts'][0]['failures'] == 1 and 'refused' in said['accounts'][0]['errors'][0], said
    assert told(t.run('--json', '--nonsense').out, 2)['accounts'] == []
    with open(t.path, 'w') as f:
        f.write('{ "destination": 1 }')
    said = told(t.run('--json').out, 2)
    assert any('destination' in e for e in said['errors']), said


def test_json_after_a_signal(t):
    boxes = {'INBOX': imapd.Mailbox(sample.many(20))}
    with imapd.Server(boxes, hook=lambda session, tag, name, args: name == 'UID_FETCH' and time.sleep(2)) as server:
        t.config(t.account(server, mode='plain', ssl=False))
        running = subprocess.Popen([*t.program, '--json', t.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(1)
        running.send_signal(signal.SIGTERM)
        out = running.communicate(timeout=30)[0]
        told(out, 1)
