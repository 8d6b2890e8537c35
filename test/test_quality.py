"""What programs that read sources say of ours: the quick ones."""
import os
import subprocess

from run import HERE


def test_lint(t):
    done = subprocess.run([os.path.join(HERE, 'lint.sh')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout.decode(errors='replace'))
    assert done.returncode == 0
