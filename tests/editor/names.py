"At a prompt: everything by `exp.NAME`."
import exp

print(exp.__version__, len(dir(exp)))
sched = exp.combine_scheds([.3, .7], exp.cos_1cycle_anneal(.1, .3, .05))
print(sched(.5), exp.annealing.sched_cos is exp.sched_cos)
