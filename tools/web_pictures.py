"""Make docs/images/web-*.png, the pictures in docs/web.md: pages of a sweep of the demo's program, in Chromium.

Needs Chromium and the packages of the extra `browser`:

    python tools/web_pictures.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

TREE = Path(__file__).resolve().parents[1]
PICTURES = TREE / "docs" / "images"
GRID = ("lr=1,0.3,0.1,0.03", "width=64,128,256,512", "hydra.sweep.dir=multirun/lr-width", "epoch_seconds=0.5")
DESK, PHONE = {"width": 1100, "height": 780}, {"width": 400, "height": 780}
SECONDS = 1000.0


def main() -> None:
    """Draw the pool while the sweep runs, the sweep when it has ended, and the form for another one."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name, sync_playwright() as playwright:
        directory = Path(name)
        shutil.copyfile(TREE / "gpu_launcher" / "cli" / "demo_program.py", directory / "train.py")
        environ = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "HOME": name}
        environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
        program = ("python", "train.py", "-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4")
        web = ("gpu-launcher", "web", "--devices", "simulated:4")
        sweep = subprocess.Popen([*program, *GRID], cwd=directory, env=environ)
        server = subprocess.Popen(web, cwd=directory, env=environ, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            link = server.stdout.readline().strip()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            desk = opened(browser, link, DESK, "light")
            desk.get_by_role("link", name="Sweeps").click()
            desk.get_by_role("link", name="lr-width").click(timeout=60 * SECONDS)
            desk.locator("a.failed").wait_for(timeout=60 * SECONDS)
            page = desk.url
            desk.get_by_role("link", name="Pool").click()
            desk.get_by_text("train.py").first.wait_for()
            desk.screenshot(path=PICTURES / "web-pool.png")
            sweep.wait()
            desk.goto(page)
            desk.get_by_text("ended").first.wait_for()
            phone = opened(browser, link, PHONE, "dark")
            phone.goto(page)
            for window, picture in ((desk, "web-sweep.png"), (phone, "web-sweep-phone.png")):
                window.wait_for_timeout(2 * SECONDS)  # the charts are animated
                window.screenshot(path=PICTURES / picture, full_page=window is desk)
            desk.get_by_role("link", name="New sweep").click()
            desk.get_by_label("A Hydra program").check()
            desk.get_by_label("Command", exact=True).fill("python train.py")
            desk.get_by_label("Parameters").fill("lr=0.3,0.1\nwidth=128,256")
            desk.get_by_label("Jobs at the same time").fill("2")
            desk.get_by_role("button", name="Check").click()
            desk.get_by_text("Nothing is wrong").wait_for(timeout=60 * SECONDS)
            desk.screenshot(path=PICTURES / "web-new.png", full_page=True)
            browser.close()
        finally:
            for process in (sweep, server):
                process.terminate()
                process.wait()


def opened(browser: Any, link: str, size: dict[str, int], scheme: str) -> Any:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(link)
    return page


if __name__ == "__main__":
    main()
