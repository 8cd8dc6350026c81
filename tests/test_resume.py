"""Training callbacks of 09f over a kill: patience goes on being used up, the best weights are those from before, steps of many batches too."""
import pytest
from test_checkpoints import digest, never_stopped, resumed, same, stopped, weights

from exp.callbacks import AvgStatsCallback
from exp.checkpoints import Checkpoint
from exp.files import read_file
from exp.training_callbacks import CSVLogger, EarlyStopping, GradientAccumulation, GradientClip, SaveBest


@pytest.mark.parametrize('at', [1, 4, 7, 9])
def test_steps_of_many_batches(at, tmp_path):
    "Three batches a step and seven an epoch: gradients are under way nearly everywhere."
    def cbs(): return [GradientAccumulation(3), GradientClip(.5)]
    want = digest(never_stopped(2, cbs()))
    learn = stopped(tmp_path, at, 2, cbs())
    grads = read_file(Checkpoint(tmp_path).files()[0], 'checkpoint')['parts']['gradients']
    assert set(grads) == ({n for n, _ in learn.model.named_parameters()} if at != 7 else set())
    assert digest(resumed(tmp_path, 2, cbs())) == want


def test_patience_and_the_best(tmp_path):
    def cbs(): return [EarlyStopping('train_loss', patience=2, min_delta=10.), SaveBest('valid_loss')]
    a = cbs()
    ref = never_stopped(6, a)
    stopped(tmp_path, 9, 6, cbs())
    b = cbs()
    new = resumed(tmp_path, 6, b)
    assert len(ref.cb(AvgStatsCallback).rows) == 3 and digest(new) == digest(ref) and same(weights(new), weights(ref))
    assert b[0].waited == a[0].waited == 2 and b[1].best == a[1].best and b[1].best_epoch == a[1].best_epoch


def test_a_history_has_each_epoch_once(tmp_path):
    stopped(tmp_path/'c', 9, fit=[CSVLogger(tmp_path/'h.csv')])
    resumed(tmp_path/'c', fit=[CSVLogger(tmp_path/'h.csv')])
    assert [line.split(',')[0] for line in (tmp_path/'h.csv').read_text().splitlines()] == ['epoch', '0', '1', '2']
