"""The page of `gpu-launcher web`: pool, sweeps and jobs in a browser. Only `cli/web.py` and `cli/result_page.py`
import this package.

    listener.py      the socket, the link and the server
    gate.py          which requests are admitted, and what pages may do
    app.py           which view answers which URL
    views.py         reads, and fills a template of `templates/`, which templating.py knows
    pool_watch.py    one reading of the pool for all pages; catalogue.py: of each sweep; fresh.py: how they share it
    table_page.py    what of the readings is shown, with charts.py and failure_groups.py; all pure
    static_page.py   the page of a sweep as one file, for `gpu-launcher results --html`
    job_files.py     logs, config and files of a job; log_text.py: parts of a log
    dashboard.py     the study of a search in optuna-dashboard, which runs in processes of dashboard_process.py
    actions.py       what can be done to a sweep
    new_sweep.py     the form for a new sweep, as a command line; programs.py: runs it, or its dry run

Nothing here reads the files of the pool or of a sweep's record in its own way: `allocation/` and `jobs/` do.

Pages are complete without JavaScript, except for charts and actions. A part of a page that changes is asked for again
every second or two, and is not sent if the browser has it.
"""
