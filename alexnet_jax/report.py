def write(workdir): print("report", workdir)
