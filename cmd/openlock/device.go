package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
	"github.com/urfave/cli/v3"
)

func deviceCommand() *cli.Command {
	dir := &cli.StringFlag{Name: "dir", Usage: "`folder` of the device's identity; devices/lock-<id> in the data folder by default"}
	return &cli.Command{
		Name: "device", Usage: "devices: their identity, and a simulated lock",
		Commands: []*cli.Command{
			{
				Name: "enroll", Usage: "write key, certificate and CA for a lock", ArgsUsage: "LOCK-ID",
				Flags: []cli.Flag{dataFlag(), dir}, Action: inFolder(enrollDevice),
			},
			{
				Name: "revoke", Usage: "end a lock's certificates, and its connection within 5 s", ArgsUsage: "LOCK-ID",
				Flags: []cli.Flag{dataFlag()}, Action: inFolder(revokeDevice),
			},
			{
				Name: "run", Usage: "run a simulated lock against a server", ArgsUsage: "LOCK-ID",
				Flags: append([]cli.Flag{
					dataFlag(), dir,
					&cli.StringFlag{Name: "broker", Value: "127.0.0.1:8883", Usage: "`address` of the server's MQTT", Sources: cli.EnvVars("OPENLOCK_MQTT")},
					&cli.DurationFlag{Name: "relock", Value: 5 * time.Second, Usage: "the door stays unlocked for this `time`"},
				}, faultFlags()...),
				Action: runDevice,
			},
		},
	}
}

func faultFlags() []cli.Flag {
	const faults = "Faults"
	return []cli.Flag{
		&cli.DurationFlag{Name: "offline-for", Category: faults, Usage: "do not connect for this `time` after the start"},
		&cli.DurationFlag{Name: "slow", Category: faults, Usage: "the bolt takes this `time` before it moves"},
		&cli.BoolFlag{Name: "jam", Category: faults, Usage: "the bolt does not move"},
		&cli.BoolFlag{Name: "low-battery", Category: faults, Usage: "the battery is too low to move the bolt"},
		&cli.BoolFlag{Name: "lose-ack", Category: faults, Usage: "the bolt moves, but the outcome is never reported"},
		&cli.DurationFlag{Name: "clock-off-by", Category: faults, Usage: "the device's clock is ahead by this `time` (behind, if negative)"},
		&cli.BoolFlag{Name: "unsynchronised", Category: faults, Usage: "the device's clock means nothing"},
	}
}

func faults(cmd *cli.Command) device.Faults {
	return device.Faults{
		OfflineFor: cmd.Duration("offline-for"), Slow: cmd.Duration("slow"), Jam: cmd.Bool("jam"),
		LowBattery: cmd.Bool("low-battery"), LoseAck: cmd.Bool("lose-ack"),
		ClockOffset: cmd.Duration("clock-off-by"), Unsynchronised: cmd.Bool("unsynchronised"),
	}
}

// deviceOf finds the lock that a command is about and its device's folder.
func deviceOf(cmd *cli.Command) (id lock.ID, dir string, err error) {
	name, err := argument(cmd, "lock id")
	if err != nil {
		return 0, "", err
	}
	if id, err = lock.ParseID(name); err != nil {
		return 0, "", err
	}
	if dir = cmd.String("dir"); dir == "" {
		dir = filepath.Join(cmd.String("data"), "devices", id.Thing())
	}
	return id, dir, nil
}

func enrollDevice(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	id, dir, err := deviceOf(cmd)
	if err != nil {
		return err
	}
	if err := f.enroll(ctx, id, dir); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s is enrolled: device.key, device.crt and ca.crt are in %s\n", id.Thing(), dir)
	return nil
}

func revokeDevice(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	id, _, err := deviceOf(cmd)
	if err != nil {
		return err
	}
	err = f.db.RevokeCertificates(ctx, id.Thing(), f.clock.Wall())
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%s has no certificate that could be revoked", id.Thing())
	}
	if err == nil {
		fmt.Fprintf(out, "%s must be enrolled anew to connect again\n", id.Thing())
	}
	return err
}

func runDevice(ctx context.Context, cmd *cli.Command) error {
	id, dir, err := deviceOf(cmd)
	if err != nil {
		return err
	}
	cfg := deviceConfig(id, dir, cmd.String("broker"))
	cfg.RelockAfter, cfg.Faults = cmd.Duration("relock"), faults(cmd)
	cfg.Observe = device.Draw(cmd.Root().Writer, cfg.Thing)
	d, err := device.New(cfg)
	if err != nil {
		return fmt.Errorf("%w (a new device needs `openlock device enroll %s`)", err, id)
	}
	return d.Run(ctx)
}

func deviceConfig(id lock.ID, dir, broker string) device.Config {
	return device.Config{
		Thing: id.Thing(), Broker: broker, StateDir: filepath.Join(dir, "state"),
		CertFile: filepath.Join(dir, "device.crt"), KeyFile: filepath.Join(dir, "device.key"), CAFile: filepath.Join(dir, "ca.crt"),
	}
}
