/** Pictures shown one after another, over and over, at the pace of the video. */

const SLOWEST = 500;
const FASTEST = 60;
const PAUSE = 350; // before it starts over

export class Player {
  constructor(image) {
    this.image = image;
    this.pictures = [];
    this.at = 0;
    this.timer = null;
    this.calm = window.matchMedia?.("(prefers-reduced-motion: reduce)").matches ?? false;
  }

  /** Play these ({frame, url}, in order); the ones that play already go on where they are. */
  play(pictures, fps) {
    const current = this.pictures[this.at]?.frame;
    this.pictures = pictures;
    this.fps = fps;
    const found = pictures.findIndex((picture) => picture.frame === current);
    this.at = this.calm ? Math.max(0, pictures.length - 1) : Math.max(0, found);
    this.show();
    if (this.timer === null && !this.calm) this.tick();
  }

  show() {
    const picture = this.pictures[this.at];
    if (picture && this.image.getAttribute("src") !== picture.url) this.image.src = picture.url;
  }

  tick() {
    if (this.pictures.length < 2 || !this.image.isConnected) {
      this.timer = null;
      return;
    }
    const next = (this.at + 1) % this.pictures.length;
    const step = (1000 * (this.pictures[next].frame - this.pictures[this.at].frame)) / this.fps;
    const wait = next === 0 ? PAUSE : Math.min(SLOWEST, Math.max(FASTEST, step));
    this.timer = setTimeout(() => {
      this.at = next < this.pictures.length ? next : 0;
      this.show();
      this.tick();
    }, wait);
  }

  end() {
    clearTimeout(this.timer);
    this.timer = null;
  }
}
