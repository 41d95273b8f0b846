package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	tea "github.com/charmbracelet/bubbletea"

	"portcullis/policycache/live"
)

// topScreen is top on a terminal.
type topScreen struct {
	top           *live.Top
	sort          string
	interval      time.Duration
	width, height int
	now           time.Time
	trouble       string // the last one
	from          int    // the first row of denials that is shown
}

// sampleMsg is an agent's new figures, troubleMsg what keeps one from answering, and
// clockMsg that time has gone by.
type (
	sampleMsg  struct{ sample *live.Sample }
	troubleMsg string
	clockMsg   time.Time
)

func newTopScreen(sort string, interval time.Duration) topScreen {
	return topScreen{top: live.NewTop(), sort: sort, interval: interval, width: 80, height: 24, now: time.Now()}
}

// watch shows the screen until the user quits or ctx ends.
func (o *topOptions) watch(ctx context.Context, f *fleet, agents []agentSource, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	program := tea.NewProgram(newTopScreen(o.sort, o.interval), tea.WithContext(ctx), tea.WithInput(in), tea.WithOutput(out), tea.WithAltScreen())
	var readers sync.WaitGroup
	readers.Go(func() {
		f.follow(ctx, agents, func(ctx context.Context, a agentSource) error {
			return a.samples(ctx, o.interval, func(s *live.Sample) { program.Send(sampleMsg{s}) })
		}, newTroubles(troubleWriter{program}))
	})
	_, err := program.Run()
	stopped := ctx.Err() != nil
	cancel()
	readers.Wait()
	if stopped {
		return nil // by a signal
	}
	return err
}

// troubleWriter shows troubles on the screen, which they would spoil elsewhere.
type troubleWriter struct{ program *tea.Program }

func (w troubleWriter) Write(b []byte) (int, error) {
	w.program.Send(troubleMsg(bytes.TrimSpace(b)))
	return len(b), nil
}

// Init implements tea.Model.
func (s topScreen) Init() tea.Cmd { return s.clock() }

func (s topScreen) clock() tea.Cmd {
	return tea.Tick(time.Second, func(t time.Time) tea.Msg { return clockMsg(t) })
}

// Update implements tea.Model.
func (s topScreen) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case sampleMsg:
		s.top.Add(msg.sample)
		s.now = time.Now()
	case troubleMsg:
		s.trouble = string(msg)
	case clockMsg:
		s.now = time.Time(msg)
		s.top.Forget(s.now.Add(-max(time.Minute, 10*s.interval)))
		return s, s.clock()
	case tea.WindowSizeMsg:
		s.width, s.height = msg.Width, msg.Height
	case tea.KeyMsg:
		return s.key(msg.String())
	}
	return s, nil
}

func (s topScreen) key(key string) (tea.Model, tea.Cmd) {
	at := slices.Index(live.Sorts, s.sort)
	switch key {
	case "q", "ctrl+c", "esc":
		return s, tea.Quit
	case "s":
		s.sort = live.Sorts[(at+1)%len(live.Sorts)]
	case "S":
		s.sort = live.Sorts[(at+len(live.Sorts)-1)%len(live.Sorts)]
	case "down", "j":
		s.from++
	case "up", "k":
		s.from = max(0, s.from-1)
	case "home", "g":
		s.from = 0
	}
	return s, nil
}

// View implements tea.Model: the page, cut to the terminal's size.
func (s topScreen) View() string {
	head := fmt.Sprintf("portcullis top  %s  by %s   q quits, s sorts, j and k scroll", s.now.Format("15:04:05"), s.sort)
	if s.trouble != "" {
		head += "\n" + s.trouble
	}
	nodes, denials, _ := strings.Cut(s.top.Page(s.sort, 0, s.now, time.Local), "\n\n")
	lines := strings.Split(strings.TrimRight(denials, "\n"), "\n")
	rows := lines[1:]
	rows = rows[min(s.from, max(0, len(rows)-1)):]
	all := slices.Concat(strings.Split(head+"\n\n"+nodes, "\n"), []string{"", lines[0]}, rows)
	all = all[:min(len(all), max(1, s.height-1))]
	for i, line := range all {
		if r := []rune(line); len(r) > s.width {
			all[i] = string(r[:max(0, s.width)])
		}
	}
	return strings.Join(all, "\n")
}
