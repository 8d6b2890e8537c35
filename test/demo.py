#!/usr/bin/env python3
"""A demonstration: back up a sample mailbox from a private Dovecot, change it, back up again, and
show what came of it. Everything happens in a folder of its own, which is removed at the end."""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import archive    # noqa: E402
import sample     # noqa: E402
import servers    # noqa: E402

PROGRAM = os.environ.get('IMAP_BACKUP', os.path.join(os.path.dirname(HERE), 'imap_backup'))
USER = 'ada'
EMAIL = 'ada@example.org'


def slow_line(port, octets_sec):
    """A port that leads to another one at a limited rate, so that there is something to see."""
    def pour(source, sink, rate):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                sink.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
            sink.shutdown(socket.SHUT_WR)

    def serve():
        while True:
            client = listener.accept()[0]
            server = socket.create_connection(('127.0.0.1', port))
            for ends in ((client, server, 0), (server, client, octets_sec)):
                threading.Thread(target=pour, args=ends, daemon=True).start()

    listener = socket.create_server(('127.0.0.1', 0))
    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def say(text):
    bold = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    print('\n\033[1m%s\033[m' % text if bold else '\n' + text, flush=True)


def run(folder, *arguments):
    """What a person would type."""
    print('$ imap_backup ' + ' '.join(arguments), flush=True)
    status = subprocess.run([PROGRAM, *arguments], cwd=folder, stderr=sys.stdout).returncode
    if status:
        sys.exit('exit status %d' % status)


def excerpt(path, wanted):
    """From line, state and subject of the stored mails with these Message-IDs."""
    mails = re.split(r'\n(?=From MAILER)', open(path, encoding='utf-8', errors='replace').read())
    for message_id, why in wanted:
        mail = next((m for m in mails if message_id in m), None)
        if mail is None:
            sys.exit('%s is not in %s' % (message_id, path))
        lines = mail.split('\n')
        print('    %s\n    %s     <- %s\n    %s\n    ...' % (
            lines[0], lines[1], why, next(x for x in lines if x.startswith('Subject:'))))


def main():
    folder = tempfile.mkdtemp(prefix='imap_backup-demo-')
    os.chmod(folder, 0o755)   # the server runs as nobody if we are root
    server = None
    try:
        certificates = servers.Certificates(os.path.join(folder, 'certs'))
        server = servers.Dovecot(os.path.join(folder, 'dovecot'), certificates.good)
        imap = archive.login('127.0.0.1', server.port, USER, servers.PASSWORD)
        boxes = sample.boxes(mails=300)
        for name, mails in boxes.items():
            sample.deliver(imap, name, mails)
        say('A private Dovecot %s now holds %d mails in %d mailboxes.'
            % (server.version, sum(map(len, boxes.values())), len(boxes)))
        config = {'destination': 'backup', 'accounts': [
            {'email': EMAIL, 'username': USER, 'password': servers.PASSWORD, 'host': 'localhost',
             'port': slow_line(server.tls, 400_000), 'ssl': True, 'ca_file': certificates.ca}]}
        with open(os.path.join(folder, 'config.json'), 'w') as f:
            json.dump(config, f, indent=2)
        os.chmod(f.name, 0o600)
        print('The configuration:')
        print(open(f.name).read().replace(folder + '/', ''))
        say('1. The first backup, over TLS, at 400 kB/s for each connection')
        run(folder)
        say('2. A new mail, one deleted, one moved to Work, one flagged; then the next backup')
        before = archive.fetch(imap, 'Sent')
        imap.select('Sent')
        imap.uid('STORE', '1,2', '+FLAGS', '(\\Deleted)')
        imap.uid('COPY', '2', 'Work')
        imap.uid('EXPUNGE', '1,2')
        imap.uid('STORE', '3', 'FLAGS', '(\\Seen \\Flagged)')
        sample.deliver(imap, 'Sent', [sample.Mail(
            b'From: ada@example.org\r\nTo: bob@example.com\r\nSubject: hello\r\nMessage-ID: <hello@example.org>\r\n'
            b'\r\nDear Bob,\r\n\r\nFrom today on there is a backup.\r\n', '\\Seen', int(time.time()))])
        run(folder)
        say('3. And another: nothing has changed, no mailbox is opened')
        run(folder)
        say('4. What is there now')
        run(folder, '--list')
        print('\nFrom %s/Sent.mbox (X-Mozilla-Status: 0001 read, 0004 flagged, 0008 gone from the server):'
              % os.path.join('backup', EMAIL))
        ids = [archive.own_id(m.data).decode() for m in before[:3]]
        excerpt(os.path.join(folder, 'backup', EMAIL, 'Sent.mbox'), (
            (ids[0], 'deleted on the server, kept here'), (ids[1], 'moved to Work'), (ids[2], 'flagged'),
            ('<hello@example.org>', 'new')))
        complaints = archive.compare_account(os.path.join(folder, 'backup', EMAIL), archive.fetch_all(imap),
                                             gone={'Sent': before[:2]})
        if complaints:
            sys.exit('\n'.join(complaints))
        say('Every mail in the archive has been compared with the server\'s, octet by octet: they are the same.')
    finally:
        if server:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main()
