"""Start a Ray on this machine within a time limit, or ask whether a cluster answers, before it is used."""
