"""What must hold on the worst day: kills, power cuts, disk faults. What torture.py has found, each by
itself, and a sample of its campaign."""
import fcntl
import os
import random
import resource
import shutil
import subprocess
import threading
import time

import archive
import imapd
import mutate
import sample
import servers
import torture
from run import PROGRAM, Skip, sanitized


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
    for session in (imapd.Session, torture.Plain):
        r = rig(t, session)
        was = mailbox('a', 'b', flags='')
        box = backed_up(r, was)
        box.expunge(1)
        box = backed_up(r, box)
        box.add(was.mails[0].data, '\\Flagged', was.mails[0].when)
        backed_up(r, box)


def test_flags_of_the_copy_that_stays(t):
    """Of two copies the one goes whose flags the archive had: from now on the other's count."""
    for session in (imapd.Session, torture.Plain):
        r = rig(t, session)
        box = backed_up(r, imapd.Mailbox([b'Message-ID: <copied@x>\r\n\r\n'] * 2))
        box.flag(2, '\\Flagged')
        box = backed_up(r, box)
        box.expunge(1)
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


# ---- others at the same files ----

def meddle(r, box, n, command):
    """Run; after its n-th operation somebody does this in the archive's folder."""
    r.serve(box)
    return r.run('call', n, FAULTS_CALL='if [ -s %s ]; then cd %s/%s; %s; fi' % (
        r.mbox(), r.dest, torture.EMAIL, command))


def big_mails(label=''):
    rng = random.Random('big' + label)
    return [sample.mail(rng, 'small' + label), sample.mail(rng, 'lines' + label, b'\r\n' * 150_000),
            sample.with_attachment(rng, 'large' + label, 100_000), sample.mail(rng, 'last' + label)]


def meddled_everywhere(r, was, box, command, there=()):
    """The meddling, after each operation of a run; whatever comes, the next run sees to it. 'there':
    texts of other mails that are to be found."""
    step = torture.Step(r, command, was, box)
    heard = []
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.begin(r, step)
        status, err = meddle(r, box, n, command)
        heard.append(err)
        what = '%s after operation %d' % (command, n)
        assert status in (0, 1) and 'worker died' not in err, '%s: %s' % (what, err)
        r.server.boxes = {'INBOX': box}
        status, again = r.run()
        assert status == 0, '%s: then %s' % (what, again)
        stored = archive.read(r.mbox())
        texts = [torture.whole_of(s) for s in stored if not s.state & archive.GONE]
        for m in torture.held(box):
            assert texts.count(archive.quote(m.data)) == 1, '%s: %r is %d times in it\n%s%s' % (
                what, m.data[:80], texts.count(archive.quote(m.data)), err, again)
        assert len(texts) == len(box.mails), '%s: a mail too many: %r\n%s%s' % (what, [
            x[:100] for x in texts if x not in {archive.quote(m.data) for m in box.mails}], err, again)
        for text in there:
            assert text in [s.text for s in stored], '%s: it is lost\n%s' % (what, err)
        before = torture.tree(r.disk)
        assert r.run()[0] == 0
        assert torture.tree(r.disk) == before, what
    return heard


FOREIGN = ('printf "From MAILER-DAEMON Thu Jan  1 00:00:00 1970\\nX-Mozilla-Status: 0001\\nMessage-ID: <foreign@x>\\n\\nhi\\n\\n" '
           '>>INBOX.mbox')


def test_a_mail_reader_appends_in_mid_run(t):
    r = rig(t)
    was = imapd.Mailbox(big_mails())
    box = backed_up(r, was)
    for m in big_mails(' too'):
        box.add(m.data)
    heard = meddled_everywhere(r, was, box, FOREIGN, there=[b'Message-ID: <foreign@x>\n\nhi\n'])
    assert any('another program changed it' in h for h in heard), heard


def test_a_mail_reader_compacts_it_in_mid_run(t):
    """In place: the first mail is cut out, all others stand elsewhere."""
    r = rig(t)
    was = imapd.Mailbox(big_mails())
    box = backed_up(r, was)
    for m in big_mails(' too'):
        box.add(m.data, '\\Seen')
    box.flag(2, '\\Flagged')
    first = len(archive.read(r.mbox())[0].text) + 68
    heard = meddled_everywhere(r, was, box, 'cp INBOX.mbox x; tail -c +%d x >INBOX.mbox; rm x' % (first + 1))
    assert any('another program changed it' in h for h in heard), heard


def test_an_editor_saves_it_in_mid_run(t):
    r = rig(t)
    was = imapd.Mailbox(big_mails())
    box = backed_up(r, was)
    for m in big_mails(' too'):
        box.add(m.data)
    box.flag(1, '\\Flagged')
    heard = meddled_everywhere(r, was, box, 'cp INBOX.mbox x; mv x INBOX.mbox')
    assert any('another program replaced it' in h for h in heard), heard


def test_runs_at_the_same_time(t):
    """One is in the middle of a mailbox: the others say so and leave it alone; so it is, too, if they come
    from another place and only meet at the mbox."""
    r = rig(t)
    box = backed_up(r, mailbox('a', 'b', 'c'))
    box.add(b'Message-ID: <next@x>\r\n\r\n')
    r.serve(box)
    inside, others_over = threading.Event(), threading.Event()

    def hook(session, tag, name, args):
        if name == 'EXAMINE' and not inside.is_set():
            inside.set()
            others_over.wait(60)

    r.server.hook = hook
    one = r.start()
    assert inside.wait(60)
    for said in ('another run is at work', 'another program has locked it'):
        status, err = r.run()
        assert status == 3 and said in err, err
        os.unlink(os.path.join(r.dest, torture.EMAIL, '.lock'))
    others_over.set()
    assert (one.communicate(), one.returncode)[1] == 0
    r.settle(box, 'together')


def test_the_next_run_beside_workers_of_a_dead_parent(t):
    r = rig(t)
    was = mailbox('a', 'b', 'c')
    box = backed_up(r, was)
    box.add(big_mails()[1].data)
    box.flag(1, '\\Flagged')
    step = torture.Step(r, 'parent', was, box)
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.begin(r, step)
        orphaned = r.start('before', n, FAULTS_DIES='parent')
        orphaned.wait()
        status, err = r.run()
        assert status in (0, 3) and 'died' not in err, err
        orphaned.communicate()
        r.settle(box, 'parent dead at operation %d' % n)


def test_a_mail_reader_holds_the_lock(t):
    r = rig(t)
    box = backed_up(r, mailbox('a'))
    box.add(b'Message-ID: <more@x>\r\n\r\n')
    r.serve(box)
    before = torture.tree(r.disk)
    with open(r.mbox(), 'r+b') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        status, err = r.run()
        assert status == 3 and 'locked' in err and torture.tree(r.disk) == before, err
    backed_up(r, box)


# ---- forged mail ----

def same(r, boxes):
    wrong = [w for name, box in boxes.items() for w in archive.compare(r.mbox(name), torture.held(box))]
    assert not wrong, '\n'.join(wrong[:6])


def test_forged_mails_break_nothing(t):
    mails = sample.forged(random.Random(1))
    for segment in (0, 1021, 16_384):
        r = rig(t, type('Segments', (imapd.Session,), {'segment': segment}))
        for order in (mails, mails[::-1]):
            box = imapd.Mailbox(order, uidvalidity=len(order) + (order is mails))
            torture.plant(r.disk, {})
            r.server.boxes = {'INBOX': box}
            status, err = r.run()
            assert status == 0, err
            same(r, {'INBOX': box})
            os.unlink(r.mbox() + '.index')
            before = torture.tree(r.disk)
            status, err = r.run()
            after = torture.tree(r.disk)
            assert status == 0 and all(after[p] == before[p] for p in before), err


def test_from_lines_wherever_octets_are_parted(t):
    """By the server's segments, and by the program's buffer of 64 KB."""
    line = b'From >From \r\n>>From x\r\n\r\nFrom\r\n\r'
    for segment in (1, 2, 3, 7, 13):
        r = rig(t, type('Segments', (imapd.Session,), {'segment': segment}))
        boxes = {'INBOX': imapd.Mailbox([b'Message-ID: <%d@x>\r\n\r\n' % n + b'.' * n + line * 5
                                         for n in range(segment)])}
        if segment == 13:
            boxes.update(('B%d' % n, imapd.Mailbox([b'Message-ID: <b@x>\r\n\r\n' + b'.' * n + b'\r\n' + line * 6000]))
                         for n in range(16))
            r.server.session.segment = 0
        r.server.boxes = boxes
        status, err = r.run()
        assert status == 0, err
        same(r, boxes)


# ---- disks ----

def test_a_limit_on_file_sizes(t):
    """EFBIG, and the signal that comes with it, as on FAT."""
    r = rig(t)
    box = imapd.Mailbox(big_mails())
    r.serve(box)
    status, err = r.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)))
    assert status == 1 and 'no larger file' in err and 'died' not in err, err
    backed_up(r, box)


def as_root(*command):
    try:
        servers.tool(*command, env={'PATH': servers.SBIN})
    except (OSError, RuntimeError) as e:
        raise Skip(str(e).split('\n')[0])


def mounted(t, r, *options):
    as_root('mount', *options, r.disk)
    t.cleanups.insert(0, lambda: as_root('umount', '-l', r.disk))


def full_until(r, message, *command, torn=False):
    """No room for all mails: this is said, by a further run too; then the command makes room. torn: part of a
    mail may stand there meanwhile."""
    box = imapd.Mailbox(big_mails())
    r.serve(box)
    for _ in range(2):
        status, err = r.run()
        assert status == 1 and message in err, err
        assert torn or {torture.whole_of(s) for s in archive.read(r.mbox())} <= {
            archive.quote(m.data) for m in box.mails}
    as_root(*command)
    return backed_up(r, box)


def test_a_quota_for_real(t):
    """That of a btrfs subvolume, as on a NAS, holds for root too. At its quota btrfs does not even shorten a
    file: what is torn is cut off by the run that has room again."""
    r = rig(t)
    image = os.path.join(r.folder, 'image')
    with open(image, 'wb') as f:
        f.truncate(120 << 20)
    as_root('mkfs.btrfs', '-q', image)
    mounted(t, r, '-o', 'loop', image)
    as_root('btrfs', 'quota', 'enable', r.disk)
    as_root('btrfs', 'subvolume', 'create', r.dest)
    as_root('btrfs', 'qgroup', 'limit', '200k', r.dest)
    full_until(r, 'quota exceeded', 'btrfs', 'qgroup', 'limit', '10m', r.dest, torn=True)


def test_a_small_disk_for_real(t):
    r = rig(t)
    mounted(t, r, '-t', 'tmpfs', '-o', 'size=200k', 'none')
    box = full_until(r, 'No space left', 'mount', '-o', 'remount,size=10m', r.disk)
    was = torture.copy_box(box)
    box.add(b'Message-ID: <more@x>\r\n\r\n')
    subprocess.run(['mount', '-o', 'remount,ro', r.disk], check=True)
    r.serve(box)
    before = torture.tree(r.disk)
    status, err = r.run()
    assert status == 1 and 'Read-only' in err and torture.tree(r.disk) == before, err
    subprocess.run(['mount', '-o', 'remount,rw', r.disk], check=True)
    backed_up(r, box)


def test_mails_that_could_not_be_synced_are_fetched_again(t):
    """A second fsync() would succeed, and yet they would not be on the disk."""
    r = rig(t)
    was = mailbox('a', 'b')
    box = backed_up(r, was)
    box.add(b'Message-ID: <more@x>\r\n\r\n')
    step = torture.Step(r, 'sync', was, box)
    n, done = torture.undisturbed(r, step)
    torture.begin(r, step)
    before = os.path.getsize(r.mbox())
    status, err = r.run('EIO', n - len(done) + [o[0] == 'sync' and o[2] == r.mbox() for o in done].index(True) + 1)
    assert status == 1 and 'cannot sync' in err and os.path.getsize(r.mbox()) == before, err
    r.settle(box, 'synced')


def test_nothing_old_is_cut_where_a_sync_fails(t):
    """While a tail is taken over, with a mail that the server has no more and a torn one behind it."""
    r = rig(t)
    box = backed_up(r, mailbox('a', 'b', flags=''))
    old = index(r)
    box.add(b'Message-ID: <gone@x>\r\n\r\n')
    box = backed_up(r, box)
    box.expunge(3)
    box.add(b'Message-ID: <torn@x>\r\n\r\nlong enough a body\r\n')
    box = backed_up(r, box)
    with open(r.mbox(), 'r+b') as f:
        f.truncate(os.path.getsize(r.mbox()) - 9)
    with open(r.mbox() + '.index', 'wb') as f:
        f.write(old)
    step = torture.Step(r, 'taken over', box, box, torn=True)
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.fault_at(r, step, n, 'EIO', ever=False)


def test_the_destination_vanishes(t):
    """Moved away, or its stick pulled out, after any operation: an error, and all is well once it is back."""
    r = rig(t)
    was = imapd.Mailbox(big_mails())
    box = backed_up(r, was)
    box.add(b'Message-ID: <more@x>\r\n\r\n')
    step = torture.Step(r, 'vanishes', was, box)
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.begin(r, step)
        status, err = r.run('call', n, FAULTS_CALL='mv %s %s.away' % (r.dest, r.dest))
        assert status in (0, 1) and 'died' not in err, err
        if os.path.exists(r.dest + '.away'):
            shutil.rmtree(r.dest, ignore_errors=True)
            os.rename(r.dest + '.away', r.dest)
        r.settle(box, 'vanished after operation %d: %s' % (n, err))


def test_a_torn_mail_with_bare_line_feeds(t):
    """Stored, each of them is as long as CRLF: the mail may be torn and yet not too short."""
    r = rig(t)
    box = imapd.Mailbox([b'Message-ID: <a@x>\r\n\r\nx\r\n', b'Message-ID: <lf@x>\r\n\r\n' + b'line\n' * 100])
    box = backed_up(r, box)
    os.unlink(r.mbox() + '.index')
    with open(r.mbox(), 'r+b') as f:
        f.truncate(os.path.getsize(r.mbox()) - 50)
    r.settle(box, 'torn', torn=True)


# ---- power cuts ----

def test_a_first_backup_outlasts_a_power_cut(t):
    """With its folder, also if an earlier run died before it had synced the archive's name in there."""
    r = rig(t)
    box = mailbox('a', 'b')
    step = torture.Step(r, 'first', imapd.Mailbox(), box)
    for n in range(1, torture.undisturbed(r, step)[0] + 1):
        torture.begin(r, step)
        disk, log = torture.Disk(r.disk, {}), os.path.join(r.folder, 'log')
        for died in (True, False):
            r.run('before' if died else '-', n, log=log)
            for operation in r.logged(log):
                disk.apply(*operation)
        left, wanted = disk.cut('none', random.Random(1)), torture.tree(r.disk)
        assert {p: o for p, o in left.items() if not p.endswith('.index')} == \
            {p: o for p, o in wanted.items() if not p.endswith('.index')} and len(left) == len(wanted), 'died at operation %d: there is only %s' % (n, sorted(left))


def test_a_run_that_died_at_the_mark_and_then_a_power_cut(t):
    """"Writing" was in the index, but not on the disk: the next run may not rely on it before it appends."""
    for renumbers in (False, True):
        r = rig(t)
        was, log = mailbox('a', 'b'), os.path.join(r.folder, 'log')
        box = backed_up(r, was)
        box.add(sample.mail(random.Random(2), 'c', 'x' * 2000).data)
        if renumbers:   # then the index is a new file, whose name may not be on the disk
            box.renumber()
        step = torture.Step(r, 'cut', was, box)
        for n in range(1, torture.undisturbed(r, step)[0] + 1):
            torture.begin(r, step)
            disk = torture.Disk(r.disk, step.before)
            for died in (True, False):
                r.run('before' if died else '-', n, log=log)
                for what, offset, path, octets in r.logged(log):
                    if not died and what == 'write' and path == r.mbox() and len(octets) > 4:
                        disk.apply(what, offset, path, octets[:300])
                        break
                    disk.apply(what, offset, path, octets)
            disk.pending.clear()
            torture.plant(r.disk, disk.cut('mbox', random.Random(1)))
            r.settle(box, 'died before operation %d' % n)


def test_a_new_uidvalidity_and_a_power_cut(t):
    """The index's state came to the disk, and its records did not: their UIDs are not of its UIDVALIDITY."""
    r = rig(t)
    was = mailbox('a', 'b', 'c')
    held = backed_up(r, was)
    box = imapd.Mailbox(uidvalidity=was.uidvalidity + 1)
    for m in (imapd.Mail(0, sample.mail(random.Random(2), 'd').data, [], sample.T0, 0), *held.mails):
        box.add(m.data, ' '.join(m.flags), m.when)   # each UID is another mail's now
    step = torture.Step(r, 'renumbered', was, box)
    operations = torture.undisturbed(r, step)[1]
    disk, name = torture.Disk(r.disk, step.before), os.path.relpath(r.mbox(), r.disk) + '.index'
    for n, operation in enumerate(operations):
        disk.apply(*operation)
        torture.begin(r, step)
        files, (first, *_, last) = disk.cut('mbox', random.Random(1)), [*disk.now[name].versions] * 2
        files[name] = first[:1536] + last[1536:2048] + first[2048:]
        torture.plant(r.disk, files)
        r.settle(box, 'cut behind operation %d' % n)


# ---- a sample of the campaign ----

def part(t, campaign, some):
    r, rng = rig(t), random.Random(5)
    steps = torture.history(r, rng)
    campaign(r, rng, steps, some)
    print('%d disturbed of %d runs' % (r.disturbed, r.runs))


def test_some_kills(t):
    part(t, torture.kills, .03)


def test_some_power_cuts(t):
    part(t, torture.cuts, .035)


def test_some_torn_mails(t):
    part(t, torture.tears, .04)


def test_some_disk_faults(t):
    part(t, torture.disk_faults, .04)


def test_some_chains(t):
    r = rig(t)
    for seed in range(6):
        torture.chain(r, random.Random(seed), 12)


def test_some_cut_lines(t):
    r = rig(t)
    cuts = torture.lines(r, random.Random(os.getpid()), many=64)
    for _ in range(3):
        next(cuts)


def test_some_mutating_servers(t):
    """Seeds are printed with what is wrong."""
    mutate.episodes(sanitized(), random.SystemRandom().getrandbits(32), time.monotonic() + 5)
