"""``student.py END OVERRIDES``: mtr-lab train, ended at a point in time (seconds since the epoch) by the teacher's Deadline.

With WAIT_FOR=FILE it imports everything, and begins when the file exists. Under torchrun, too.
"""
import os, sys, time
sys.path.insert(0, os.environ["T"] + "/code/experiments/tiny_imagenet")
from train_teacher import Deadline
import mtr_lab.training.run as run
from mtr_lab.train import main

END = float(sys.argv.pop(1))
state = {}

class Ends(Deadline):
    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if state["config"].training.epochs != trainer.max_epochs and trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1}: {trainer.max_epochs} epochs", flush=True)
        state["config"].training.epochs = trainer.max_epochs
        state["last"]._settings["training.epochs"] = trainer.max_epochs

inner, make = run._train, run.make_trainer

def with_config(config, folder):
    state["config"] = config
    return inner(config, folder)

def with_deadline(*arguments, callbacks, **others):
    state["last"] = next(c for c in callbacks if isinstance(c, run.LastCheckpoint))
    return make(*arguments, callbacks=[*callbacks, Ends(END)], **others)

run._train, run.make_trainer = with_config, with_deadline
if wait := os.environ.get("WAIT_FOR"):
    print("ready", flush=True)
    while not os.path.exists(wait):
        time.sleep(0.2)
main()
