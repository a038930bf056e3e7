package device

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/mattn/go-isatty"
)

// Draw returns an observer, for Config.Observe, that shows the lock called
// thing on w: on a terminal as a small panel that is drawn anew for each event,
// elsewhere as one line an event.
func Draw(w io.Writer, thing string) func(Event) {
	f, ok := w.(*os.File)
	if !ok || !isatty.IsTerminal(f.Fd()) {
		return func(e Event) { fmt.Fprintf(w, "%s %s\n", thing, line(e)) }
	}
	p := &panel{w: w, thing: thing}
	return p.draw
}

func line(e Event) string {
	words := []string{e.At.Format("15:04:05.000"), fmt.Sprintf("%-12s", e.Kind)}
	if e.CommandID != "" {
		words = append(words, e.CommandID)
	}
	if e.Reason != "" {
		words = append(words, "("+e.Reason+")")
	}
	return strings.TrimRight(strings.Join(words, " "), " ")
}

const (
	history = 5  // events shown below the lock
	width   = 76 // columns
)

type panel struct {
	w      io.Writer
	thing  string
	recent []string
	drawn  int // lines on the terminal
}

func (p *panel) draw(e Event) {
	p.recent = append(p.recent, cut(line(e)))
	p.recent = p.recent[max(0, len(p.recent)-history):]
	lines := append(p.picture(e.State), p.recent...)

	var out strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&out, "\x1b[%dA", p.drawn) // back up to the first line
	}
	for _, l := range lines {
		fmt.Fprintf(&out, "  %s\x1b[K\n", l) // and clear what was there before
	}
	p.drawn = len(lines)
	_, _ = io.WriteString(p.w, out.String()) // a terminal that is gone shows nothing
}

func (p *panel) picture(s State) []string {
	link, clock := red("○ offline"), red("unsynchronised")
	if s.Online {
		link = green("● online")
	}
	if s.Synchronised {
		clock = green("synchronised")
	}
	shackle, side, bolt := "│   │", "┏┷━━━┷┓", bold("LOCKED")
	if !s.Locked {
		shackle, side, bolt = "│    ", "┏┷━━━━┓", green(bold("UNLOCKED"))
	}
	return []string{
		"",
		" ╭───╮    " + bold(p.thing) + "  " + link,
		" " + shackle + "    " + bolt,
		side + "   battery  " + gauge(s.Battery),
		"┃  ●  ┃   clock    " + clock,
		"┗━━━━━┛",
		"",
	}
}

// cut keeps a line from wrapping, which would shift the panel.
func cut(s string) string {
	if r := []rune(s); len(r) > width {
		return string(r[:width-1]) + "…"
	}
	return s
}

func gauge(percent int) string {
	full := (percent + 9) / 10
	return fmt.Sprintf("%s%s %d %%", strings.Repeat("▰", full), strings.Repeat("▱", 10-full), percent)
}

func bold(s string) string  { return "\x1b[1m" + s + "\x1b[0m" }
func green(s string) string { return "\x1b[32m" + s + "\x1b[0m" }
func red(s string) string   { return "\x1b[31m" + s + "\x1b[0m" }
