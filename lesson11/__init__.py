"The distribution's own name, for the command `exp-lab`. The course makes the package `exp`."
