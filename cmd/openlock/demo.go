package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
	"github.com/urfave/cli/v3"
)

const (
	demoLock   = lock.ID(123)
	demoOrg    = "demo"
	demoWithin = 10 * time.Second // for the door to open
)

func demoCommand() *cli.Command {
	return &cli.Command{
		Name: "demo", Usage: "open a simulated door, end to end, in a temporary folder",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "once", Usage: "end after the door has opened; fail if it has not within 10 s"},
			&cli.StringFlag{Name: "http", Value: "127.0.0.1:8787", Usage: "`address` of the API"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			return demo(ctx, cmd.Root().Writer, cmd.Root().ErrWriter, cmd.String("http"), cmd.Bool("once"))
		},
	}
}

// demo is the main job in one command: everything real but the bolt.
func demo(ctx context.Context, out, errOut io.Writer, address string, once bool) (err error) {
	dir, err := os.MkdirTemp("", "openlock-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := start(ctx, config{
		data: filepath.Join(dir, "data"), http: address, mqtt: "127.0.0.1:0",
		settings: control.DefaultSettings, drain: 3 * time.Second,
		log: slog.New(slog.NewTextHandler(errOut, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	d := &demonstration{server: s, out: out, dir: dir, events: make(chan device.Event, 64)}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	stop, err := d.runDevice(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if err = d.open(ctx); err != nil && ctx.Err() != nil {
		err = errors.New("the demo was ended before the door had opened")
	}
	if err != nil || once {
		return err
	}
	d.invite()
	return d.watch(ctx)
}

// demonstration is a demo under way.
type demonstration struct {
	*server
	out        io.Writer
	dir        string
	key, token string
	device     device.Config
	events     chan device.Event
}

// prepare makes an organization, its key, a user's token, the lock and its
// device's identity.
func (d *demonstration) prepare(ctx context.Context) error {
	if _, err := d.registry.CreateOrganization(ctx, demoOrg, "Demo"); err != nil {
		return err
	}
	key, _, err := d.registry.Create(ctx, auth.NewCredential{Kind: store.APIKey, Org: demoOrg, Name: "demo"})
	if err != nil {
		return err
	}
	builtin, err := d.builtin(ctx, "", d.url())
	if err != nil {
		return err
	}
	token, _, err := builtin.User(uuid.NewString(), 24*time.Hour, d.clock.Wall())
	if err != nil {
		return err
	}
	d.key, d.token = key, token
	identity := filepath.Join(d.dir, demoLock.Thing())
	if err := d.enroll(ctx, demoLock, identity); err != nil {
		return err
	}
	d.device = deviceConfig(demoLock, identity, d.mqtt.Addr().String())
	_, err = d.post(ctx, "CreateLock", map[string]any{"index": demoLock, "uuid": uuid.NewString()}, http.StatusCreated)
	return err
}

// runDevice starts the simulated lock. The device waits for its observer, which
// therefore gives up when the device is to stop.
func (d *demonstration) runDevice(ctx context.Context) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(ctx)
	d.device.Observe = func(e device.Event) {
		select {
		case d.events <- e:
		case <-ctx.Done():
		}
	}
	sim, err := device.New(d.device)
	if err != nil {
		cancel()
		return nil, err
	}
	stopped := make(chan error, 1)
	go func() { stopped <- sim.Run(ctx) }()
	return func() error {
		cancel()
		return <-stopped
	}, nil
}

// open sends the reference page's request and tells what happened when.
func (d *demonstration) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, demoWithin)
	defer cancel()
	if _, err := d.await(ctx, device.Connected); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "openlock %s demo: lock %s with a simulated device, on %s\n\n", version, demoLock, d.url())
	fmt.Fprintf(d.out, "POST /locks/%s/OpenLock\n", demoLock)
	begun := time.Now()
	answer, err := d.post(ctx, "OpenLock", map[string]any{"requestId": "example_string", "reason": "example_string"}, http.StatusOK)
	if err != nil {
		return err
	}
	answered := time.Now()
	opened, err := d.await(ctx, device.Opened)
	if err != nil {
		return err
	}
	recorded, err := time.Parse(time.RFC3339, answer.Event.Data.Timestamp)
	if err != nil {
		return err
	}
	for _, step := range []struct {
		at   time.Time
		what string
	}{
		{recorded, "recorded  " + answer.Event.Type + ", durable, version " + fmt.Sprint(answer.Version)},
		{answered, "sent      200, command " + answer.Command.ID},
		{opened.At, "opened    the device moved its bolt"},
	} {
		fmt.Fprintf(d.out, "  %s  %+6d ms  %s\n", step.at.UTC().Format("15:04:05.000"), max(0, step.at.Sub(begun).Milliseconds()), step.what)
	}
	if _, err = d.await(ctx, device.Reported); err == nil {
		fmt.Fprintf(d.out, "\nThe door is open.\n")
	}
	return err
}

// await waits for an event of the device.
func (d *demonstration) await(ctx context.Context, k device.Kind) (device.Event, error) {
	for {
		select {
		case e := <-d.events:
			if e.Kind == k {
				return e, nil
			}
			if e.Kind == device.Refused || e.Kind == device.Failed {
				return e, fmt.Errorf("the device did not open: %s (%s)", e.Kind, e.Reason)
			}
		case <-ctx.Done():
			return device.Event{}, fmt.Errorf("the device was not %s within %s", k, demoWithin)
		}
	}
}

// invite prints the request without a requestId, so that sending it twice opens
// twice.
func (d *demonstration) invite() {
	fmt.Fprintf(d.out, `
Open it again yourself (Ctrl-C ends the demo and removes all it made):

curl -X POST "%s/locks/%s/OpenLock" \
-H "Content-Type: application/json" \
-H "Authorization: Bearer %s" \
-H "X-API-Key: %s" \
-d '{"reason": "I want to see it"}'

`, d.url(), demoLock, d.token, d.key)
}

// watch draws the lock until the demo is ended.
func (d *demonstration) watch(ctx context.Context) error {
	draw := device.Draw(d.out, demoLock.Thing())
	for {
		select {
		case e := <-d.events:
			draw(e)
		case <-ctx.Done():
			return nil
		case <-d.db.Broken():
			return d.db.Err()
		}
	}
}

// demoAnswer is what the demo reads of a command's answer.
type demoAnswer struct {
	Version int64 `json:"version"`
	Event   struct {
		Type string `json:"type"`
		Data struct {
			Timestamp string `json:"timestamp"`
		} `json:"data"`
	} `json:"event"`
	Command struct {
		ID string `json:"id"`
	} `json:"command"`
}

// post sends what an integrator would send, over real HTTP.
func (d *demonstration) post(ctx context.Context, route string, body any, want int) (answer demoAnswer, err error) {
	b, err := json.Marshal(body)
	if err != nil {
		return answer, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url()+"/locks/"+demoLock.String()+"/"+route, bytes.NewReader(b))
	if err != nil {
		return answer, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", d.key)
	if route == "OpenLock" { // as the reference page does
		req.Header.Set("Authorization", "Bearer "+d.token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != want {
		err = fmt.Errorf("%s answered %s: %s", route, resp.Status, text)
	}
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	return answer, err
}
